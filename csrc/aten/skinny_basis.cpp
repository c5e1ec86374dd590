// The bases of skinny matrices: the first ones, and the refreshes of long sides.
#include <ATen/ops/maximum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>

#include "aten/bounds.h"
#include "aten/decompositions.h"
#include "aten/no_denormals.h"
#include "aten/products.h"
#include "aten/refresh_basis.h"
#include "aten/skinny.h"

namespace dykaf::aten {
namespace {

at::Tensor symmetric(const at::Tensor& x) { return x.add(x.mT()).div_(2); }

// Of a factor [b, n, n].
struct PowerIteration {
  at::Tensor diagonal;  // of the old factor, descending
  at::Tensor order;     // that sorts it
  at::Tensor P;         // what the basis is multiplied by
  at::Tensor F;         // in the new basis
  at::Tensor sound;     // bool [b]; where false, P and F are of no use
};

// As in csrc/cpu/refresh_basis.cpp (E9).
PowerIteration power_iteration(const at::Tensor& F) {
  const auto [diagonal, order] =
      at::sort(F.diagonal(0, -2, -1), /*stable=*/true, /*dim=*/-1, /*descending=*/true);
  const at::Tensor rows = order.unsqueeze(-1).expand_as(F);
  const at::Tensor columns = order.unsqueeze(-2).expand_as(F);
  const auto [turn, S, sound] = judged_qr(F.gather(-2, rows).gather(-1, columns));
  return {diagonal, order, turn.scatter(-2, rows, turn), symmetric(full_product(S, turn)), sound};
}

// 1 for the directions of a long side whose eigenvalues [..., k], descending, are more than the
// flat rest to rounding, else 0: rows of zeros stand for those in the basis. They are as good as
// any others outside of it, and would be combinations of weights with a gradient and of others
// without.
at::Tensor is_distinct(const at::Tensor& eigenvalues, const at::Tensor& flat, int64_t l) {
  const at::Tensor noise =
      eigenvalues.amax(-1, /*keepdim=*/true).mul_(rounding_share_of(eigenvalues, l));
  return eigenvalues.gt(noise.add_(flat)).to(eigenvalues.scalar_type());
}

// 1 for the columns of x [..., k, l] with an entry that is not zero, else 0, [..., 1, l]. In the
// others weights have had no gradient: what a decomposition of x leaves there is rounding.
at::Tensor live_columns(const at::Tensor& x) {
  return x.abs().amax(-2, /*keepdim=*/true).gt(0).to(x.scalar_type());
}

// Q R of the transposed rows [b, used, l], the first `inner` of which a refresh has left
// orthonormal but for rounding. With a look only what the others have outside of these is
// decomposed, a quarter of the work, as long as all of Q comes out orthonormal: not where rows are
// zero, or were rounded.
JudgedQR judged_qr_of_rows(const at::Tensor& rows, int64_t inner, Looks looks) {
  const int64_t added = rows.size(1) - inner;
  if (looks == Looks::kOnHost && added > 0) {
    const at::Tensor V = rows.narrow(1, 0, inner);
    at::Tensor rest = rows.narrow(1, inner, added).mT();
    at::Tensor within = at::zeros({rows.size(0), inner, added}, rows.options());
    for (int pass = 0; pass < 2; ++pass) {  // twice is enough (Kahan, in Parlett 1980)
      const at::Tensor part = full_product(V, rest);
      within.add_(part);
      rest = rest.sub(full_product(V.mT(), part));
    }
    const auto [Z, T] = signed_qr(rest);
    const at::Tensor Q = at::cat({V.mT(), Z}, 2);
    const at::Tensor sound = is_orthonormal(Q);
    if (sound.all().item<bool>()) {
      const at::Tensor R = at::zeros({rows.size(0), inner + added, inner + added}, rows.options());
      R.diagonal(0, 1, 2).narrow(1, 0, inner).fill_(1);
      R.narrow(1, 0, inner).narrow(2, inner, added).copy_(within);
      R.narrow(1, inner, added).narrow(2, inner, added).copy_(T);
      return {Q, R, sound};
    }
  }
  return judged_qr(rows.mT());
}

}  // namespace

void initialize_skinny_(const Matrix& w, const Options& options, const at::Tensor& gradient,
                        double tau) {
  const at::Tensor H = w.is_wide() ? gradient : gradient.t();
  const at::Tensor& F = w.is_wide() ? w.L : w.R;
  const at::Tensor& Q = w.is_wide() ? w.Q_L : w.Q_R;
  const int64_t size = H.size(0);
  const auto s = static_cast<double>(size);
  const auto l = static_cast<double>(H.size(1));
  const double beta = options.factor_beta;
  const at::Tensor identity = at::eye(size, H.options());
  const auto basis_of = [&](const at::Tensor& factor) {
    if (const std::optional<Eigen> eigen = eigenvectors(factor)) return eigen->vectors;
    w.refresh_fallbacks.add_(1);
    return identity;
  };

  // The prior is a multiple of the identity whose trace is that of the gradient's term.
  const at::Tensor gram = full_product(H, H.t());
  const double gram_trace = gram.trace().item<double>();
  const double prior = beta > 0 ? (1 - beta) * gram_trace / (s * l) : 0;
  const at::Tensor sum = gram.mul((1 - beta) / l).add_(identity, prior);
  const double norm = sum.norm().item<double>();
  w.rho.select(0, w.is_wide() ? 0 : 1).fill_(tau * std::sqrt(norm));
  const at::Tensor unit = sum.div(norm);
  Q.copy_(basis_of(unit));
  F.copy_(symmetric(full_product(Q.t(), full_product(unit, Q))));

  std::optional<QR> qr = checked_qr(H.t());
  if (!qr) {
    // Any orthonormal rows will do: what they do not see is the rest.
    w.refresh_fallbacks.add_(1);
    const at::Tensor units = at::eye(H.size(1), size, H.options());
    qr = QR{units, full_product(units.t(), H.t())};
  }
  const auto [Z, T] = *qr;
  const at::Tensor inner = full_product(T, T.t());
  const at::Tensor U = basis_of(inner);
  const double trace = prior * l + (1 - beta) * gram_trace / s;
  w.rho.select(0, w.is_wide() ? 1 : 0).fill_(tau * std::sqrt(trace));
  w.flat.fill_(prior / trace);
  at::Tensor core = symmetric(full_product(U.t(), full_product(inner, U)));
  const at::Tensor seen = is_distinct(core.diagonal(), at::zeros({}, core.options()), l);
  w.basis.narrow(0, 0, size).copy_(full_product(Z, U).mul_(seen).t().mul(live_columns(H)));
  core = core.mul_(seen).mul_(seen.unsqueeze(1));
  w.core.narrow(0, 0, size).narrow(1, 0, size).copy_(core.mul_((1 - beta) / (s * trace)));
  w.rows[0] = w.rows[1] = size;
}

at::Tensor bounded_second_moment(const at::Tensor& exp_avg_sq, const Options& options,
                                 const at::Tensor& exp_avg, const at::Tensor& V,
                                 const at::Tensor& steps) {
  const int64_t inner = V.size(-2);
  const at::Tensor MV = momentum_in(V, exp_avg).square_();
  const at::Tensor outside = mean_outside(options, exp_avg.square().sum(-1, /*keepdim=*/true),
                                          MV.sum(-1, /*keepdim=*/true), exp_avg.size(-1) - inner);
  const at::Tensor floor = per_matrix(momentum_floors(options, steps).to(exp_avg.scalar_type()));
  const at::Tensor bounded = exp_avg_sq.clone();
  const auto raise_ = [&](at::Tensor moment, const at::Tensor& square) {
    moment.copy_(at::maximum(moment, square.mul(floor)));
  };
  raise_(bounded.narrow(-1, 0, inner), MV);
  raise_(bounded.narrow(-1, bounded.size(-1) - 1, 1), outside);
  return bounded;
}

void refresh_long_(Batch& batch, const Options& options, Looks looks) {
  const NoDenormals no_denormals;
  const Matrix& first = batch.first();
  const int64_t rank = first.skinny_rank;
  const int64_t inner = first.rows[0];
  const int64_t used = first.rows[1];
  const int64_t kept = std::min(rank, used);
  const int64_t l = first.long_side();
  const auto rows_in = [](int64_t count) {
    return [count](const Matrix& w) { return w.basis.narrow(0, 0, count); };
  };

  // The factor is flat I + Z (F - flat I) Z^T, Z's first columns being the old basis.
  const at::Tensor flat = batch.get(&Matrix::flat);
  const at::Tensor rows = batch.get_part(rows_in(used));
  // Rounding of the old basis would add up.
  const bool corrects =
      (first.refreshes[first.is_wide() ? 1 : 0] + 1) % kRefreshesPerCorrection == 0;
  const auto [Z, T, is_basis] = judged_qr_of_rows(rows, inner, corrects ? Looks::kNever : looks);
  const at::Tensor core = batch.get(&Matrix::core);
  const at::Tensor used_core = core.narrow(1, 0, used).narrow(2, 0, used);
  const at::Tensor old_F = symmetric(full_product(full_product(T, used_core), T.mT()));
  old_F.diagonal(0, 1, 2).add_(flat.unsqueeze(1));
  // The mean eigenvalue outside of the first `count` directions of a factor with this diagonal.
  const auto mean_beyond = [&](const at::Tensor& diagonal, int64_t count) {
    return flat.mul(l - used)
        .add(diagonal.narrow(1, count, used - count).sum(1))
        .div(l - count)
        .unsqueeze(1);
  };
  const at::Tensor old_mean = mean_beyond(old_F.diagonal(0, 1, 2), inner);
  const auto [diagonal, order, P, F, is_turn] = power_iteration(old_F);
  const at::Tensor new_diagonal = F.diagonal(0, 1, 2).narrow(1, 0, kept);
  const at::Tensor mean = mean_beyond(F.diagonal(0, 1, 2), kept);

  // A direction that was in no basis had the second moment and the eigenvalue of the rest.
  const at::Tensor chosen = order.narrow(1, 0, kept);
  const at::Tensor old_moments = batch.get(&Matrix::exp_avg_sq);
  const at::Tensor moments = old_moments.clone();
  const at::Tensor rest = moments.narrow(2, rank, 1);
  const at::Tensor old_columns =
      at::cat({old_moments.narrow(2, 0, inner), rest.expand({-1, -1, used - inner})}, 2);
  const at::Tensor old_eigenvalues =
      at::where(chosen.lt(inner), diagonal.narrow(1, 0, kept), old_mean);
  const at::Tensor columns =
      old_columns.gather(2, chosen.unsqueeze(1).expand({-1, old_columns.size(1), -1}))
          .mul_(growth(options, old_eigenvalues, new_diagonal).unsqueeze(1));
  rest.mul_(growth(options, old_mean, mean).unsqueeze(1));
  moments.narrow(2, 0, kept).copy_(columns);
  const at::Tensor seen = is_distinct(new_diagonal, flat.unsqueeze(1), l);
  const at::Tensor basis =
      full_product(Z, P.narrow(2, 0, kept)).mul_(seen.unsqueeze(1)).mT().mul(live_columns(rows));
  const at::Tensor exp_avg = batch.get(&Matrix::exp_avg);
  const at::Tensor bounded =
      bounded_second_moment(moments, options, first.is_wide() ? exp_avg : exp_avg.mT(), basis,
                            batch.get(&Matrix::step).to(batch.wide_dtype()));
  const at::Tensor new_core = at::zeros_like(core);
  const at::Tensor kept_core = new_core.narrow(1, 0, kept).narrow(2, 0, kept);
  kept_core.copy_(F.narrow(1, 0, kept).narrow(2, 0, kept));
  kept_core.diagonal(0, 1, 2).sub_(mean);
  kept_core.mul_(seen.unsqueeze(1)).mul_(seen.unsqueeze(2));

  // Where a decomposition failed the old basis stays, and the gradients since are forgotten.
  const at::Tensor sound = is_basis.logical_and(is_turn);
  const bool moves_all = looks == Looks::kOnHost && sound.all().item<bool>();
  const auto where_moved = [&](const at::Tensor& moved, const auto& old) {
    return moves_all ? moved : at::where(per_matrix(sound), moved, old());
  };
  const auto within_inner = [&](const at::Tensor& x, int64_t num_rows, int64_t num_cols) {
    const at::Tensor old = at::zeros_like(x);
    old.narrow(1, 0, num_rows)
        .narrow(2, 0, num_cols)
        .copy_(x.narrow(1, 0, num_rows).narrow(2, 0, num_cols));
    return old;
  };
  batch.set_part(rows_in(kept), where_moved(basis, [&] {
                   return within_inner(rows.narrow(1, 0, kept), inner, l);
                 }));
  batch.set(&Matrix::core, where_moved(new_core, [&] { return within_inner(core, inner, inner); }));
  batch.set(&Matrix::flat, at::where(sound, mean.squeeze(1), flat));
  batch.set(&Matrix::exp_avg_sq, where_moved(bounded, [&] { return old_moments; }));
  batch.set(&Matrix::refresh_fallbacks,
            batch.get(&Matrix::refresh_fallbacks).add(sound.logical_not().to(at::kLong)));
  batch.commit();
  for (const Matrix* w : batch.matrices()) {
    w->refreshes[w->is_wide() ? 1 : 0] += 1;
    w->rows[0] = w->rows[1] = kept;
  }
}

void forget_gradients_(const Matrix& w) {
  const int64_t inner = w.rows[0];
  w.core.narrow(0, inner, w.core.size(0) - inner).zero_();
  w.core.narrow(1, inner, w.core.size(1) - inner).zero_();
  w.rows[1] = inner;
}

}  // namespace dykaf::aten
