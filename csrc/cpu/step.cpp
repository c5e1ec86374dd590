// The whole step of a list of matrices.
#include <vector>

#include "cpu/each_matrix.h"
#include "cpu/linalg.h"
#include "cpu/matrix.h"
#include "cpu/skinny.h"
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
  if (p.is_skinny()) {
    view(update, p.m, p.n).copy_(skinny_step_(p, options, view(H, p.m, p.n), tau));
    return apply_update_(p, options, update);
  }
  rotate(p, Rotation::kIntoBasis, H, H, workspace.product);
  adam_update_(p, options, H, tau, update);
  rotate(p, Rotation::kOutOfBasis, update, update, workspace.product);
  apply_update_(p, options, update);
  if (updates_factors(p, options)) factor_update_(p, options, H, tau, workspace);
}

}  // namespace

template <typename T>
void refresh_due_(std::span<const Problem<T>> problems, const Options& options) {
  const auto due = take_due(problems, options);
  for (const Side side : {Side::kLeft, Side::kRight}) {
    refresh_basis_(std::span<const Problem<T>>(due[static_cast<size_t>(side)]), options, side);
  }
}

template <typename T>
void step_(std::span<const Problem<T>> problems, const Options& options, Refreshes refreshes) {
  std::vector<Problem<T>> running;
  std::vector<Problem<T>> fresh;
  for (const Problem<T>& p : problems) {
    (awaits_first_gradient(p) ? fresh : running).push_back(p);
  }
  const std::span<const Problem<T>> steps(running);
  for_each_matrix(steps, make_workspace<T>, [&](size_t i, Workspace<T>& workspace) {
    plain_step_(steps[i], options, workspace);
  });
  if (refreshes == Refreshes::kWithStep) refresh_due_(steps, options);
  initialize_(std::span<const Problem<T>>(fresh), options);
}

template void refresh_due_(std::span<const Problem<float>>, const Options&);
template void refresh_due_(std::span<const Problem<double>>, const Options&);
template void step_(std::span<const Problem<float>>, const Options&, Refreshes);
template void step_(std::span<const Problem<double>>, const Options&, Refreshes);

}  // namespace dykaf::cpu
