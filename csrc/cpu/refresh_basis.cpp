// One power iteration with orthonormalisation, in the rotated form. With Pi sorting diag(F)
// descending and F Pi = P S (QR), the new basis is Q P and the new factor P^T F P = S Pi^T P: what
// X = M Q Pi, Q = orthonormalise(X) is for the unrotated factor M = Q F Q^T.
#include "cpu/each_matrix.h"
#include "cpu/linalg.h"
#include "cpu/matmul_precision.h"
#include "cpu/matrix.h"
#include "cpu/refresh.h"
#include "cpu/second_moment.h"
#include "cpu/skinny.h"
#include "dykaf/ops.h"

namespace dykaf::cpu {

at::Tensor orthonormalized(const at::Tensor& Q) {
  return Q.mul(1.5).sub(at::matmul(Q, at::matmul(Q.mT(), Q)), 0.5);
}

at::Tensor growth(const Options& options, const at::Tensor& old_diagonal,
                  const at::Tensor& new_diagonal) {
  if (!options.rescale_exp_avg_sq) return at::ones_like(new_diagonal);
  const at::Tensor ratio = new_diagonal.div(old_diagonal).clamp(0.1, 10.0);
  return at::where(old_diagonal.gt(0), ratio, at::ones_like(ratio));
}

namespace {

template <typename T>
void refresh_basis_(const Problem<T>& p, const Options& options, Side side) {
  const bool left = side == Side::kLeft;
  const auto i = static_cast<int>(side);
  const int64_t n = left ? p.m : p.n;
  at::Tensor F = view(left ? p.L : p.R, n, n);
  at::Tensor Q = view(left ? p.Q_L : p.Q_R, n, n);

  const auto [old_diagonal, order] =
      at::sort(F.diagonal(), /*stable=*/true, /*dim=*/0, /*descending=*/true);
  // F Pi as (Pi^T F)^T: whole rows are copied, and LAPACK finds its own order of columns.
  const auto [P, S] = signed_qr(F.index_select(0, order).t());
  p.refreshes[i] += 1;
  if (!at::isfinite(P).all().template item<bool>()) {
    *p.refresh_fallbacks += 1;
    return;
  }
  Q.copy_(Q.mm(P));
  if (p.refreshes[i] % kRefreshesPerCorrection == 0) Q.copy_(orthonormalized(Q));
  triangular_symmetric_product(F, S, P.index_select(0, order));

  at::Tensor exp_avg = view(p.exp_avg, p.m, p.n);
  exp_avg.copy_(left ? P.t().mm(exp_avg) : exp_avg.mm(P));
  const at::Tensor factors = growth(options, old_diagonal, F.diagonal()).contiguous();
  reorder_second_moment_(p, options, side, order.const_data_ptr<int64_t>(),
                         factors.const_data_ptr<T>());
}

}  // namespace

template <typename T>
void refresh_basis_(std::span<const Problem<T>> problems, const Options& options, Side side) {
  // Rounding here would turn the bases away from orthogonality for good.
  const MatmulPrecision precision("highest");
  for_each_matrix(problems, [&](size_t i) {
    const Problem<T>& p = problems[i];
    if (p.is_skinny()) {
      const SkinnyMatrix w(p);
      const bool is_short = (side == Side::kLeft) != w.is_tall;
      is_short ? refresh_short_(w, options) : refresh_long_({&w, 1}, options);
    } else if (p.has_factor(side)) {
      refresh_basis_(p, options, side);
    }
  });
}

template void refresh_basis_(std::span<const Problem<float>>, const Options&, Side);
template void refresh_basis_(std::span<const Problem<double>>, const Options&, Side);

}  // namespace dykaf::cpu
