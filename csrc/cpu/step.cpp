// The whole step of a list of matrices.
#include <vector>

#include "cpu/each_matrix.h"
#include "cpu/matrix.h"
#include "dykaf/ops.h"
#include "dykaf/schedule.h"

namespace dykaf::cpu {
namespace {

template <typename T>
void plain_step_(const Problem<T>& p, const Options& options, Workspace<T>& workspace) {
  if (p.is_unsided()) return adamw_(p, options);

  T* H = workspace.gradient;
  T* update = workspace.update;
  const T tau = gradient_scale(p, options);
  load_gradient(p, options, tau, H);
  rotate(p, Rotation::kIntoBasis, H, H, workspace.product);
  adam_update_(p, options, H, tau, update);
  rotate(p, Rotation::kOutOfBasis, update, update, workspace.product);
  apply_update_(p, options, update);
  factor_update_(p, options, H, tau, workspace);
}

template <typename T>
void refresh_due_(std::span<const Problem<T>> problems, const Options& options) {
  std::vector<Problem<T>> due[2];
  for (const Problem<T>& p : problems) {
    if (p.is_unsided()) continue;
    const int64_t t = *p.schedule_step += 1;
    for (const Side side : {Side::kLeft, Side::kRight}) {
      const auto i = static_cast<size_t>(side);
      const bool has_factor = (side == Side::kLeft ? p.L : p.R) != nullptr;
      if (!has_factor || t < p.next_refresh[i]) continue;
      due[i].push_back(p);
      p.next_refresh[i] = next_refresh(t, options, p.refresh_offset[i]);
    }
  }
  for (const Side side : {Side::kLeft, Side::kRight}) {
    refresh_basis_(std::span<const Problem<T>>(due[static_cast<size_t>(side)]), options, side);
  }
}

}  // namespace

template <typename T>
void step_(std::span<const Problem<T>> problems, const Options& options) {
  std::vector<Problem<T>> running;
  std::vector<Problem<T>> fresh;
  for (const Problem<T>& p : problems) {
    (!p.is_unsided() && is_uninitialized(p) ? fresh : running).push_back(p);
  }
  const std::span<const Problem<T>> steps(running);
  for_each_matrix(steps, make_workspace<T>, [&](size_t i, Workspace<T>& workspace) {
    plain_step_(steps[i], options, workspace);
  });
  refresh_due_(steps, options);
  initialize_(std::span<const Problem<T>>(fresh), options);
}

template void step_(std::span<const Problem<float>>, const Options&);
template void step_(std::span<const Problem<double>>, const Options&);

}  // namespace dykaf::cpu
