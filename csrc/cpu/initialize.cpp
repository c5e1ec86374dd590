// The first gradient of a matrix: factors, first bases, first refresh dates.
#include <cmath>

#include "cpu/linalg.h"
#include "cpu/matmul_precision.h"
#include "cpu/matrix.h"
#include "dykaf/ops.h"
#include "dykaf/schedule.h"

namespace dykaf::cpu {
namespace {

// Eigenvectors of the `rank` largest eigenvalues of the factor F [n, n], descending. All others are
// equal, the identity prior's: H's part of F lives in the range of `gradient` [n, rank], so that a
// Rayleigh-Ritz step in this range is exact.
std::optional<at::Tensor> leading_eigenvectors(const at::Tensor& F, const at::Tensor& gradient) {
  if (gradient.size(1) >= F.size(0)) return eigenvectors(F);
  const at::Tensor range = signed_qr(gradient).Q;
  const at::Tensor projected = range.t().mm(F).mm(range);
  symmetrize_(projected);
  const std::optional<at::Tensor> inner = eigenvectors(projected);
  if (!inner) return std::nullopt;
  return range.mm(*inner);
}

// The orthogonal matrix [vectors | completion] by unit vectors: unique and continuous in the
// vectors' span, where an eigensolver's own choice among equal eigenvalues hangs on rounding.
at::Tensor complete_basis(const at::Tensor& vectors) {
  const int64_t n = vectors.size(0);
  const int64_t rank = vectors.size(1);
  if (rank == n) return vectors;
  const at::Tensor units = at::eye(n, vectors.options()).slice(1, 0, n - rank);
  return signed_qr(at::cat({vectors, units}, 1)).Q;
}

// The vector u of a factor u u^T.
at::Tensor rank_one_vector(const at::Tensor& F) {
  const at::Tensor column = F.select(1, F.diagonal().argmax().item<int64_t>());
  return column.div(column.norm()).unsqueeze(1);
}

template <typename T>
void first_basis_(const Problem<T>& p, const Options& options, const T* H, Side side) {
  const MatmulPrecision precision("highest");
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

}  // namespace

template <typename T>
void initialize_(const Problem<T>& p, const Options& options, const T* H, T tau,
                 Workspace<T>& workspace) {
  if (p.grad_max == 0) return;
  set_prior_(p, options, options.init, H, tau);
  // The prior can exceed tau without harm: both are near the gradient's size.
  factor_update_(p, options, H, tau, workspace);
  for (const Side side : {Side::kLeft, Side::kRight}) {
    const auto i = static_cast<int>(side);
    p.next_refresh[i] = next_refresh(0, options, p.refresh_offset[i]);
    if ((side == Side::kLeft ? p.L : p.R) != nullptr) first_basis_(p, options, H, side);
  }
}

template <typename T>
void initialize_(std::span<const Problem<T>> problems, const Options& options) {
  Workspace<T> workspace(problems);
  for (const Problem<T>& p : problems) {
    const T tau = gradient_scale(p, options);
    load_gradient(p, options, tau, workspace.gradient);
    initialize_(p, options, workspace.gradient, tau, workspace);
  }
}

template void initialize_(const Problem<float>&, const Options&, const float*, float,
                          Workspace<float>&);
template void initialize_(const Problem<double>&, const Options&, const double*, double,
                          Workspace<double>&);
template void initialize_(std::span<const Problem<float>>, const Options&);
template void initialize_(std::span<const Problem<double>>, const Options&);

}  // namespace dykaf::cpu
