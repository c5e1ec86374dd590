// The whole step of a list of matrices.
#include <cmath>
#include <optional>
#include <vector>

#include "aten/batch_ops.h"
#include "cpu/each_matrix.h"
#include "cpu/linalg.h"
#include "cpu/matrix.h"
#include "cpu/whitening.h"
#include "dykaf/ops.h"
#include "dykaf/schedule.h"

namespace dykaf::cpu {
namespace {

template <typename T>
void exact_step_(const Problem<T>& p, const Options& options) {
  const aten::Matrix w(p);
  aten::Batch batch({&w});
  aten::step_(batch, {.options = options});
}

template <typename T>
void plain_step_(const Problem<T>& p, const Options& options, const Workspace<T>& workspace) {
  if (p.is_adamw()) return adamw_(p, options);
  if (options.roots == Roots::kExact) return exact_step_(p, options);

  T* H = workspace.gradient;
  T* update = workspace.update;
  const T tau = gradient_scale(p, options);
  load_gradient(p, options, tau, H);
  if (p.is_skinny()) {
    skinny_step_(p, options, H, tau, update, workspace);
    return apply_update_(p, options, update);
  }
  rotate(p, Rotation::kIntoBasis, options.precision, H, H, workspace);
  if (options.is_whitened()) {
    whitened_update_(p, options, H, tau, update, workspace);
  } else {
    adam_update_(p, options, H, tau, update);
    if (options.orthogonalize > 0) orthogonalize_(p, options, update, workspace);
  }
  rotate(p, Rotation::kOutOfBasis, options.precision, update, update, workspace);
  apply_update_(p, options, update);
  if (!options.is_whitened() && !p.is_unsided()) factor_update_(p, options, H, tau, workspace);
}

}  // namespace

template <typename T>
void refresh_due_(std::span<const Problem<T>> problems, const Options& options) {
  const auto due = take_due(problems, options);
  for (const Side side : {Side::kLeft, Side::kRight}) {
    const std::vector<Problem<T>> list = chosen(problems, due[static_cast<size_t>(side)]);
    refresh_basis_(std::span<const Problem<T>>(list), options, side);
  }
}

template <typename T>
struct Step<T>::Memory {
  Memory(std::span<const Problem<T>> problems, const Options& options, Refreshes refreshes)
      : options(options), refreshes(refreshes) {
    for (size_t i = 0; i < problems.size(); ++i) {
      if (awaits_first_gradient(problems[i])) {
        fresh.push_back(problems[i]);
      } else {
        running.push_back(problems[i]);
        places.push_back(i);
      }
    }
    workspaces.emplace(running);
  }

  Options options;
  Refreshes refreshes;
  std::vector<Problem<T>> fresh;
  std::vector<Problem<T>> running;
  std::vector<size_t> places;  // of the running ones in the list
  std::optional<Workspaces<T>> workspaces;
};

template <typename T>
Step<T>::Step(std::span<const Problem<T>> problems, const Options& options, Refreshes refreshes)
    : memory_(std::make_unique<Memory>(problems, options, refreshes)) {}
template <typename T>
Step<T>::~Step() = default;
template <typename T>
Step<T>::Step(Step&&) noexcept = default;

template <typename T>
void Step<T>::initialize_() {
  cpu::initialize_(std::span<const Problem<T>>(memory_->fresh), memory_->options);
}

template <typename T>
void Step<T>::reset_() {
  for (const Problem<T>& p : memory_->fresh) cpu::reset_(p);
}

template <typename T>
bool Step<T>::has_fresh() const {
  return !memory_->fresh.empty();
}

template <typename T>
StepReport Step<T>::run_() {
  const std::span<const Problem<T>> running(memory_->running);
  std::vector<char> failed(running.size());
  std::vector<int64_t> fallbacks;
  for (const Problem<T>& p : running) {
    fallbacks.push_back(p.refresh_fallbacks != nullptr ? *p.refresh_fallbacks : 0);
  }
  for_each_matrix(running, *memory_->workspaces, [&](size_t i, const Workspace<T>& workspace) {
    try {
      plain_step_(running[i], memory_->options, workspace);
    } catch (const std::exception&) {
      failed[i] = 1;
    }
  });
  std::vector<Problem<T>> done;
  for (size_t i = 0; i < running.size(); ++i) {
    if (!failed[i]) done.push_back(running[i]);
  }
  if (memory_->refreshes == Refreshes::kWithStep) {
    refresh_due_(std::span<const Problem<T>>(done), memory_->options);
  }
  StepReport report;
  for (size_t i = 0; i < running.size(); ++i) {
    if (failed[i]) report.failed.push_back(memory_->places[i]);
    const int64_t* count = running[i].refresh_fallbacks;
    if (count != nullptr && *count > fallbacks[i]) {
      report.stayed.push_back(memory_->places[i]);
    }
  }
  return report;
}

template void refresh_due_(std::span<const Problem<float>>, const Options&);
template void refresh_due_(std::span<const Problem<double>>, const Options&);
template class Step<float>;
template class Step<double>;

}  // namespace dykaf::cpu
