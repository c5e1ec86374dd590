// The first gradient of a matrix: factors, first bases, first refresh dates.
#include <cmath>

#include "cpu/each_matrix.h"
#include "cpu/first_basis.h"
#include "cpu/linalg.h"
#include "cpu/matmul_precision.h"
#include "cpu/matrix.h"
#include "cpu/skinny.h"
#include "dykaf/ops.h"
#include "dykaf/schedule.h"

namespace dykaf::cpu {
namespace {

template <typename T>
void first_basis_(const Problem<T>& p, const Options& options, const T* H, Side side) {
  const bool left = side == Side::kLeft;
  const int64_t n = left ? p.m : p.n;
  at::Tensor F = view(left ? p.L : p.R, n, n);
  at::Tensor Q = view(left ? p.Q_L : p.Q_R, n, n);
  // With init "rank_one" the splitting integrators keep the factors at rank one.
  const bool rank_one = options.init == Init::kRankOne && p.L != nullptr && p.R != nullptr &&
                        options.integrator != Integrator::kDiagonal;
  std::optional<at::Tensor> vectors;
  if (rank_one) {
    vectors = rank_one_vector(F);
  } else {
    const at::Tensor gradient = view(H, p.m, p.n);
    vectors = leading_eigenvectors(F, left ? gradient : gradient.t());
  }
  if (!vectors) {
    Q.zero_().fill_diagonal_(1);
    *p.refresh_fallbacks += 1;
    return;
  }
  Q.copy_(complete_basis(*vectors));
  symmetric_product(F, Q.t().contiguous(), F.mm(Q));
}

template <typename T>
void initialize_(const Problem<T>& p, const Options& options, const T* H, T tau,
                 Workspace<T>& workspace) {
  if (p.grad_max == 0) return;
  for (const Side side : {Side::kLeft, Side::kRight}) {
    const auto i = static_cast<size_t>(side);
    p.next_refresh[i] = next_refresh(0, options, p.refresh_offset[i]);
  }
  if (p.is_skinny()) {
    const SkinnyMatrix w(p);
    const SkinnyStart start = initialize_skinny_(w, options, w.oriented(view(H, p.m, p.n)), tau);
    std::copy(start.rho, start.rho + 2, p.rho);
    *p.refresh_fallbacks += start.fallbacks;
    return;
  }
  set_prior_(p, options, options.init, H, tau);
  // The prior can exceed tau without harm: both are near the gradient's size.
  factor_update_(p, options, H, tau, workspace);
  for (const Side side : {Side::kLeft, Side::kRight}) {
    if ((side == Side::kLeft ? p.L : p.R) != nullptr) first_basis_(p, options, H, side);
  }
}

}  // namespace

template <typename T>
void initialize_(std::span<const Problem<T>> problems, const Options& options) {
  const MatmulPrecision precision("highest");
  for_each_matrix(problems, make_workspace<T>, [&](size_t i, Workspace<T>& workspace) {
    const Problem<T>& p = problems[i];
    const T tau = gradient_scale(p, options);
    load_gradient(p, options, tau, workspace.gradient);
    initialize_(p, options, workspace.gradient, tau, workspace);
  });
}

template void initialize_(std::span<const Problem<float>>, const Options&);
template void initialize_(std::span<const Problem<double>>, const Options&);

}  // namespace dykaf::cpu
