// One power iteration with orthonormalisation, in the rotated form. With Pi sorting diag(F)
// descending and F Pi = P S (QR), the new basis is Q P and the new factor P^T F P = S Pi^T P: what
// X = M Q Pi, Q = orthonormalise(X) is for the unrotated factor M = Q F Q^T. What is decomposed is
// Pi^T F Pi = (Pi^T P) S: rows that are zero but on the diagonal then stay so, to the last bit.
#include <ATen/ops/minimum.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/zeros_like.h>

#include "cpu/each_matrix.h"
#include "cpu/linalg.h"
#include "cpu/matrix.h"
#include "cpu/refresh.h"
#include "cpu/second_moment.h"
#include "cpu/skinny.h"
#include "dykaf/bounds.h"
#include "dykaf/ops.h"

namespace dykaf::cpu {

at::Tensor orthonormalized(const at::Tensor& Q) {
  return Q.mul(1.5).sub(full_product(Q, full_product(Q.mT(), Q)), 0.5);
}

at::Tensor without_noise_rows(const at::Tensor& F) {
  const double noise = rounding_share_of(F, 1);
  const at::Tensor is_known = F.diagonal(0, -2, -1).gt(noise * noise).to(F.scalar_type());
  return F.mul(is_known.unsqueeze(-1)).mul_(is_known.unsqueeze(-2));
}

at::Tensor momentum_floors(const Options& options, const at::Tensor& steps) {
  const double q = options.beta2 > 0 ? options.beta1 * options.beta1 / options.beta2 : 1.0;
  const at::Tensor t = steps.to(at::kDouble);
  const at::Tensor sum = q == 1 ? t : at::pow(q, t).sub_(1).div_(q - 1);
  at::Tensor bound = sum.mul((1 - options.beta1) * (1 - options.beta1) / (1 - options.beta2));
  if (q >= 1) bound = bound.clamp_max(1);
  return at::where(t.gt(0), bound.reciprocal(), at::zeros_like(bound));
}

at::Tensor growth(const Options& options, const at::Tensor& old_diagonal,
                  const at::Tensor& new_diagonal) {
  if (!options.rescale_exp_avg_sq) return at::ones_like(new_diagonal);
  const double noise = rounding_share_of(new_diagonal, new_diagonal.size(-1));
  const at::Tensor ratio = new_diagonal.div(old_diagonal).clamp(0.1, 10.0);
  const at::Tensor is_known = at::minimum(old_diagonal, new_diagonal).gt(noise);
  return at::where(is_known, ratio, at::ones_like(ratio));
}

namespace {

// Everything that may fail comes before anything changes.
template <typename T>
void refresh_basis_(const Problem<T>& p, const Options& options, Side side) {
  const bool left = side == Side::kLeft;
  const auto i = static_cast<int>(side);
  const int64_t n = left ? p.m : p.n;
  at::Tensor F = view(left ? p.L : p.R, n, n);
  at::Tensor Q = view(left ? p.Q_L : p.Q_R, n, n);

  const auto [old_diagonal, order] =
      at::sort(F.diagonal(), /*stable=*/true, /*dim=*/0, /*descending=*/true);
  const at::Tensor known = without_noise_rows(F);
  const std::optional<QR> qr = checked_qr(known.index_select(0, order).index_select(1, order));
  if (!qr) {
    p.refreshes[i] += 1;
    *p.refresh_fallbacks += 1;
    return;
  }
  const at::Tensor& turn = qr->Q;  // Pi^T P
  at::Tensor new_Q = full_product(Q.index_select(1, order), turn);
  if ((p.refreshes[i] + 1) % kRefreshesPerCorrection == 0) new_Q = orthonormalized(new_Q);
  const at::Tensor new_F = at::empty_like(F);
  triangular_symmetric_product(new_F, qr->R, turn);
  const at::Tensor exp_avg = view(p.exp_avg, p.m, p.n);
  const at::Tensor sorted = exp_avg.index_select(left ? 0 : 1, order);
  const at::Tensor turned = left ? full_product(turn.t(), sorted) : full_product(sorted, turn);
  const at::Tensor factors = growth(options, old_diagonal, new_F.diagonal()).contiguous();
  const at::Tensor scratch = at::empty_like(exp_avg);

  p.refreshes[i] += 1;
  Q.copy_(new_Q);
  F.copy_(new_F);
  move_moments_(p, options, side, order.const_data_ptr<int64_t>(), factors.const_data_ptr<T>(),
                turned.const_data_ptr<T>(), scratch.mutable_data_ptr<T>());
}

}  // namespace

template <typename T>
void refresh_basis_(std::span<const Problem<T>> problems, const Options& options, Side side) {
  for_each_matrix(problems, [&](size_t i) {
    const Problem<T>& p = problems[i];
    if (!p.has_factor(side)) return;
    try {
      if (p.is_skinny()) {
        const SkinnyMatrix w(p);
        const bool is_short = (side == Side::kLeft) != w.is_tall;
        is_short ? refresh_short_(w, options) : refresh_long_({&w, 1}, options);
      } else {
        refresh_basis_(p, options, side);
      }
    } catch (const std::exception&) {
      // Without memory, say: a step can do without a refresh.
      p.refreshes[static_cast<size_t>(side)] += 1;
      *p.refresh_fallbacks += 1;
      if (p.is_full()) forget_gradients_(SkinnyMatrix(p));
    }
  });
}

template void refresh_basis_(std::span<const Problem<float>>, const Options&, Side);
template void refresh_basis_(std::span<const Problem<double>>, const Options&, Side);

}  // namespace dykaf::cpu
