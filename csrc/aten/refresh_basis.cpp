// One power iteration with orthonormalisation, batched over matrices of one shape and without
// waiting for the device: csrc/cpu/refresh_basis.cpp has the mathematics.
#include "aten/refresh_basis.h"

#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>

#include <algorithm>

#include "aten/bounds.h"
#include "aten/products.h"
#include "aten/skinny.h"

namespace dykaf::aten {

at::Tensor orthonormalized(const at::Tensor& Q) {
  return Q.mul(1.5).sub(full_product(Q, full_product(Q.mT(), Q)), 0.5);
}

at::Tensor corrected_where_due(const Batch& batch, Side side, const at::Tensor& bases) {
  const auto is_due = [&](const Matrix& w) -> int64_t {
    return (w.refreshes[static_cast<size_t>(side)] + 1) % kRefreshesPerCorrection == 0 ? 1 : 0;
  };
  const auto& all = batch.matrices();
  if (std::none_of(all.begin(), all.end(), [&](const Matrix* w) { return is_due(*w) != 0; })) {
    return bases;
  }
  return at::where(per_matrix(batch.numbers(is_due).ne(0)), orthonormalized(bases), bases);
}

at::Tensor without_noise_rows(const at::Tensor& F) {
  const double noise = rounding_share_of(F, 1);
  const at::Tensor is_known = F.diagonal(0, -2, -1).gt(noise * noise).to(F.scalar_type());
  return F.mul(is_known.unsqueeze(-1)).mul_(is_known.unsqueeze(-2));
}

namespace {

// The rows or columns of each matrix of [b, m, n] in an order of its own, [b, m] or [b, n].
at::Tensor rows_of(const at::Tensor& x, const at::Tensor& order) {
  return x.gather(1, order.unsqueeze(2).expand_as(x));
}
at::Tensor columns_of(const at::Tensor& x, const at::Tensor& order) {
  return x.gather(2, order.unsqueeze(1).expand_as(x));
}

// Pi^T F Pi.
at::Tensor permuted(const at::Tensor& F, const at::Tensor& order) {
  return rows_of(columns_of(F, order), order);
}

}  // namespace

PowerIteration power_iteration(const at::Tensor& F, Orthonormalizer orthonormalizer,
                               const std::optional<at::Tensor>& skip) {
  const int64_t n = F.size(1);
  const at::Tensor known = without_noise_rows(F);
  const auto [diagonal, sorting] =
      at::sort(F.diagonal(0, 1, 2), /*stable=*/true, /*dim=*/1, /*descending=*/true);
  const auto [Q, sound] = orthonormalizer(permuted(known, sorting));
  const at::Tensor moves = skip ? sound.logical_and(skip->eq(0)) : sound;

  // Where a basis must stay nothing is sorted and nothing turns.
  const at::Tensor stays = per_matrix(moves.logical_not());
  const at::Tensor order =
      at::where(stays.squeeze(2), at::arange(n, sorting.options()).unsqueeze(0), sorting);
  const at::Tensor turn = at::where(stays, at::eye(n, Q.options()).unsqueeze(0), Q);  // Pi^T P
  const at::Tensor P = turn.scatter(1, order.unsqueeze(2).expand_as(turn), turn);
  const at::Tensor upper =
      full_product(full_product(turn.mT(), permuted(known, order)), turn).triu();
  return {diagonal, order, P, at::where(stays, F, upper.add(upper.triu(1).mT())), sound, stays};
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

// How a side of each matrix turns.
struct Turn {
  bool left;
  at::Tensor order;   // [b, side], its sorted places
  at::Tensor P;       // [b, side, side], what the basis is multiplied by
  at::Tensor growth;  // [b, side], of the second moment's entries
  at::Tensor stays;   // bool [b, 1, 1]: order and P are the identity
};

// Without what is rounding in it, but where it stays.
at::Tensor turned_momentum(const at::Tensor& exp_avg, const Turn& turn) {
  const at::Tensor turned =
      turn.left ? full_product(turn.P.mT(), exp_avg) : full_product(exp_avg, turn.P);
  const at::Tensor noise = exp_avg.abs()
                               .amax(at::IntArrayRef({1, 2}), /*keepdim=*/true)
                               .mul_(rounding_share_of(exp_avg, turn.P.size(1)));
  return at::where(turn.stays, turned, without_noise(turned, noise));
}

at::Tensor steps_of(const Batch& batch) { return batch.get(&Matrix::step).to(batch.wide_dtype()); }

void move_full_moment_(Batch& batch, const Options& options, const Turn& turn,
                       const at::Tensor& exp_avg) {
  const at::Tensor v = batch.get(&Matrix::exp_avg_sq);
  const at::Tensor moved = (turn.left ? rows_of(v, turn.order) : columns_of(v, turn.order))
                               .mul_(turn.growth.unsqueeze(turn.left ? 2 : 1));
  const at::Tensor floor = momentum_floors(options, steps_of(batch)).to(batch.dtype());
  const at::Tensor least = exp_avg.square().mul_(per_matrix(floor));
  batch.set(&Matrix::exp_avg_sq, at::where(turn.stays, moved, at::maximum(moved, least)));
}

void move_compact_moment_(Batch& batch, const Options& options, const Turn& turn) {
  const Array vector = turn.left ? &Matrix::exp_avg_sq_row : &Matrix::exp_avg_sq_col;
  const Array other = turn.left ? &Matrix::exp_avg_sq_col : &Matrix::exp_avg_sq_row;
  const at::Tensor old = batch.get(vector).gather(1, turn.order).to(batch.wide_dtype());
  const at::Tensor moved = old.mul(turn.growth);
  if (options.second_moment == SecondMoment::kRankOne) {
    const at::Tensor norm = at::linalg_vector_norm(moved, 2, at::IntArrayRef({1}));
    const at::Tensor divisor = at::where(norm.gt(0), norm, at::ones_like(norm));
    batch.set(vector, moved.div(divisor.unsqueeze(1)).to(batch.dtype()));
    batch.set(&Matrix::exp_avg_sq_scale, batch.get(&Matrix::exp_avg_sq_scale).mul(divisor.sqrt()));
    return;
  }
  // Both means move alike, for the mean of the row vector divides row_i col_j.
  const at::Tensor total = old.sum(1);
  const at::Tensor ratio = at::where(total.gt(0), moved.sum(1).div(total), at::ones_like(total));
  batch.set(vector, moved.to(batch.dtype()));
  batch.set(other, batch.get(other).mul(ratio.to(batch.dtype()).unsqueeze(1)));
}

// Along the short side; exp_avg is [b, m, n] as the parameters are.
void move_skinny_moment_(Batch& batch, const Options& options, const Turn& turn,
                         const at::Tensor& exp_avg) {
  const at::Tensor moved =
      rows_of(batch.get(&Matrix::exp_avg_sq), turn.order).mul_(turn.growth.unsqueeze(2));
  const at::Tensor V =
      batch.get_part([](const Matrix& w) { return w.basis.narrow(0, 0, w.rows[0]); });
  const at::Tensor bounded =
      bounded_second_moment(moved, options, turn.left ? exp_avg : exp_avg.mT(), V, steps_of(batch));
  batch.set(&Matrix::exp_avg_sq, at::where(turn.stays, moved, bounded));
}

}  // namespace

void refresh_basis_(Batch& batch, const Inputs& inputs, Side side,
                    Orthonormalizer orthonormalizer) {
  const Options& options = inputs.options;
  const bool left = side == Side::kLeft;
  const Array factor = left ? &Matrix::L : &Matrix::R;
  const Array basis = left ? &Matrix::Q_L : &Matrix::Q_R;
  const auto [diagonal, order, P, F, sound, stays] =
      power_iteration(batch.get(factor), orthonormalizer, inputs.skip);
  const Turn turn{left, order, P,
                  at::where(stays.squeeze(2), at::ones_like(diagonal),
                            growth(options, diagonal, F.diagonal(0, 1, 2))),
                  stays};
  const at::Tensor exp_avg = turned_momentum(batch.get(&Matrix::exp_avg), turn);

  batch.set(factor, F);
  batch.set(basis, corrected_where_due(batch, side, full_product(batch.get(basis), P)));
  batch.set(&Matrix::exp_avg, exp_avg);
  if (batch.first().is_skinny()) {
    move_skinny_moment_(batch, options, turn, exp_avg);
  } else if (batch.first().exp_avg_sq.defined()) {
    move_full_moment_(batch, options, turn, exp_avg);
  } else if (batch.first().exp_avg_sq_row.defined()) {
    move_compact_moment_(batch, options, turn);
  }
  // In a step that is skipped nothing moves, and nothing fails.
  at::Tensor failed = sound.logical_not();
  if (inputs.skip) failed = failed.logical_and(inputs.skip->eq(0));
  batch.set(&Matrix::refresh_fallbacks,
            batch.get(&Matrix::refresh_fallbacks).add(failed.to(at::kLong)));
  batch.commit();
  for (const Matrix* w : batch.matrices()) w->refreshes[static_cast<size_t>(side)] += 1;
}

}  // namespace dykaf::aten
