// The whole step of a list of matrices, one after the other through one workspace.
#include "cpu/matrix.h"
#include "dykaf/ops.h"
#include "dykaf/schedule.h"

namespace dykaf::cpu {
namespace {

template <typename T>
void refresh_due_(const Problem<T>& p, const Options& options) {
  const int64_t t = *p.schedule_step += 1;
  for (const Side side : {Side::kLeft, Side::kRight}) {
    const auto i = static_cast<int>(side);
    const bool has_factor = (side == Side::kLeft ? p.L : p.R) != nullptr;
    if (!has_factor || t < p.next_refresh[i]) continue;
    refresh_basis_(p, options, side);
    p.next_refresh[i] = next_refresh(t, options, p.refresh_offset[i]);
  }
}

template <typename T>
void step_(const Problem<T>& p, const Options& options, Workspace<T>& workspace) {
  if (p.is_unsided()) return adamw_(p, options);

  T* H = workspace.gradient;
  T* update = workspace.update;
  const T tau = gradient_scale(p, options);
  load_gradient(p, options, tau, H);
  if (is_uninitialized(p)) return initialize_(p, options, H, tau, workspace);

  rotate(p, Rotation::kIntoBasis, H, H, workspace.product);
  adam_update_(p, options, H, tau, update);
  rotate(p, Rotation::kOutOfBasis, update, update, workspace.product);
  apply_update_(p, options, update);
  factor_update_(p, options, H, tau, workspace);
  refresh_due_(p, options);
}

}  // namespace

template <typename T>
void step_(std::span<const Problem<T>> problems, const Options& options) {
  Workspace<T> workspace(problems);
  for (const Problem<T>& p : problems) step_(p, options, workspace);
}

template void step_(std::span<const Problem<float>>, const Options&);
template void step_(std::span<const Problem<double>>, const Options&);

}  // namespace dykaf::cpu
