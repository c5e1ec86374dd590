// One power iteration with orthonormalisation, in the rotated form. With Pi sorting diag(F)
// descending and F Pi = P S (QR), the new basis is Q P and the new factor P^T F P = S Pi^T P: what
// X = M Q Pi, Q = orthonormalise(X) is for the unrotated factor M = Q F Q^T. What is decomposed is
// Pi^T F Pi = (Pi^T P) S: rows that are zero but on the diagonal then stay so, to the last bit.
#include "aten/refresh_basis.h"

#include "aten/decompositions.h"
#include "aten/products.h"
#include "aten/skinny.h"
#include "cpu/each_matrix.h"
#include "cpu/linalg.h"
#include "cpu/matrix.h"
#include "cpu/second_moment.h"
#include "dykaf/ops.h"

namespace dykaf::cpu {

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
  const at::Tensor known = aten::without_noise_rows(F);
  const std::optional<aten::QR> qr =
      aten::checked_qr(known.index_select(0, order).index_select(1, order));
  if (!qr) {
    p.refreshes[i] += 1;
    *p.refresh_fallbacks += 1;
    return;
  }
  const at::Tensor& turn = qr->Q;  // Pi^T P
  at::Tensor new_Q = aten::full_product(Q.index_select(1, order), turn);
  if ((p.refreshes[i] + 1) % aten::kRefreshesPerCorrection == 0)
    new_Q = aten::orthonormalized(new_Q);
  const at::Tensor new_F = at::empty_like(F);
  triangular_symmetric_product(new_F, qr->R, turn);
  const at::Tensor exp_avg = view(p.exp_avg, p.m, p.n);
  const at::Tensor sorted = exp_avg.index_select(left ? 0 : 1, order);
  const at::Tensor turned =
      left ? aten::full_product(turn.t(), sorted) : aten::full_product(sorted, turn);
  const at::Tensor factors = aten::growth(options, old_diagonal, new_F.diagonal()).contiguous();
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
        const aten::Matrix w(p);
        aten::Batch batch({&w});
        if (w.is_long(side)) {
          aten::refresh_long_(batch, options, aten::Looks::kOnHost);
        } else {
          aten::refresh_basis_(batch, {.options = options}, side, aten::householder_orthonormalize);
        }
      } else {
        refresh_basis_(p, options, side);
      }
    } catch (const std::exception&) {
      // Without memory, say: a step can do without a refresh.
      p.refreshes[static_cast<size_t>(side)] += 1;
      *p.refresh_fallbacks += 1;
      if (p.is_full()) aten::forget_gradients_(aten::Matrix(p));
    }
  });
}

template void refresh_basis_(std::span<const Problem<float>>, const Options&, Side);
template void refresh_basis_(std::span<const Problem<double>>, const Options&, Side);

}  // namespace dykaf::cpu
