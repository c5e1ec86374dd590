// The bases of skinny matrices: the first ones, and the refreshes of long sides.
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>

#include "aten/bounds.h"
#include "aten/decompositions.h"
#include "aten/no_denormals.h"
#include "aten/products.h"
#include "aten/refresh_basis.h"
#include "aten/skinny.h"

namespace dykaf::aten {
namespace {

at::Tensor symmetric(const at::Tensor& x) { return x.add(x.mT()).div_(2); }

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
at::Tensor live_columns(const at::Tensor& x, Looks looks) {
  if (looks == Looks::kOnHost) {  // where a norm of columns is slow
    return x.abs().amax(-2, /*keepdim=*/true).gt(0).to(x.scalar_type());
  }
  constexpr double kLargest = std::numeric_limits<double>::infinity();
  return at::linalg_vector_norm(x, kLargest, at::IntArrayRef({-2}), /*keepdim=*/true)
      .gt(0)
      .to(x.scalar_type());
}

// Rows T Z of a long side with Z = last X, whose rows are orthonormal or zero.
struct LongRows {
  at::Tensor X;      // [b, used, l]
  at::Tensor last;   // [b, used, used]
  at::Tensor T;      // [b, used, used]
  at::Tensor sound;  // bool [b]
};

// By Cholesky factors, on any device.
LongRows cholesky_rows(const at::Tensor& rows) {
  const auto [X, last, sound] = orthonormal_rows(rows);
  return {X, last, full_product(full_product(rows, X.mT()), last.mT()), sound};
}

// The rows [b, used, l] by Householder's decomposition, on the CPU. What a refresh has left
// orthonormal but for rounding stays but for every 32nd time, and only what the others have outside
// of it is decomposed, a quarter of the work, as long as all comes out orthonormal: not where rows
// are zero, or were rounded.
LongRows householder_rows(const Batch& batch, Side side, const at::Tensor& rows) {
  const Matrix& first = batch.first();
  const int64_t inner = first.rows[0];
  const int64_t added = rows.size(1) - inner;
  const at::Tensor identity = at::eye(rows.size(1), rows.options()).unsqueeze(0);
  const int64_t refreshes = first.refreshes[static_cast<size_t>(side)] + 1;
  if (added > 0 && refreshes % kRefreshesPerCorrection != 0) {
    const at::Tensor V = rows.narrow(1, 0, inner);
    at::Tensor rest = rows.narrow(1, inner, added).mT();
    at::Tensor within = at::zeros({rows.size(0), inner, added}, rows.options());
    for (int pass = 0; pass < 2; ++pass) {  // twice is enough (Kahan, in Parlett 1980)
      const at::Tensor part = full_product(V, rest);
      within.add_(part);
      rest = rest.sub(full_product(V.mT(), part));
    }
    const auto [Z, R] = signed_qr(rest);
    const at::Tensor all = at::cat({V, Z.mT()}, 1);
    const at::Tensor sound = is_orthonormal(all.mT());
    if (sound.all().item<bool>()) {
      const at::Tensor T = at::zeros({rows.size(0), inner + added, inner + added}, rows.options());
      T.diagonal(0, 1, 2).narrow(1, 0, inner).fill_(1);
      T.narrow(1, inner, added).narrow(2, 0, inner).copy_(within.mT());
      T.narrow(1, inner, added).narrow(2, inner, added).copy_(R.mT());
      return {all, identity, T, sound};
    }
  }
  const auto [Q, R, sound] = judged_qr(rows.mT());
  return {Q.mT(), identity, R.mT(), sound};
}

// The columns of each X [b, n, n], positive semidefinite with its columns permuted like its rows,
// without damping: what it turned out of the basis's first directions would be lost. Columns of
// rounding leave zeros.
Orthonormalized undamped_orthonormalize(const at::Tensor& X) {
  const OrthonormalRows rows = orthonormal_rows(X);
  return {full_product(rows.last, rows.X).mT(), rows.sound};
}

// Whether the rows of each V [b, k, l] are orthonormal, but for those that are zero by `seen`.
at::Tensor is_sound(const at::Tensor& V, const at::Tensor& seen) {
  return is_orthonormal(V.mT(), seen);
}

}  // namespace

void initialize_skinny_(Batch& batch, const Options& options, const ScaledGradients& gradients) {
  const Matrix& first = batch.first();
  const at::Tensor H = first.is_wide() ? gradients.H : gradients.H.mT().contiguous();
  const int64_t size = H.size(1);
  const auto s = static_cast<double>(size);
  const auto l = static_cast<double>(H.size(2));
  const double gain = 1 - options.factor_beta;
  const at::Tensor identity = at::eye(size, H.options()).unsqueeze(0);
  at::Tensor failures = at::zeros({batch.size()}, H.options().dtype(at::kLong));
  const auto basis_of = [&](const at::Tensor& factor) {
    const Eigen eigen = settled_eigenvectors(factor);
    failures.add_(eigen.sound.logical_not());
    return at::where(per_matrix(eigen.sound), eigen.vectors, identity);
  };
  const auto of_matrix = [&](const at::Tensor& x) { return per_matrix(x.to(H.scalar_type())); };
  const auto rotated = [](const at::Tensor& F, const at::Tensor& Q) {
    return symmetric(full_product(Q.mT(), full_product(F, Q)));
  };

  // The prior is a multiple of the identity whose trace is that of the gradient's term.
  const at::Tensor gram = full_product(H, H.mT());
  const at::Tensor gram_trace = gram.diagonal(0, 1, 2).sum(1, false, batch.wide_dtype());
  const at::Tensor prior = gram_trace.mul(options.factor_beta > 0 ? gain / (s * l) : 0.0);
  const at::Tensor sum = gram.mul(gain / l).add_(identity.mul(of_matrix(prior)));
  const at::Tensor norm =
      at::linalg_vector_norm(sum, 2, at::IntArrayRef({1, 2}), false, batch.wide_dtype());
  const at::Tensor unit = sum.div(of_matrix(norm));
  const at::Tensor Q = basis_of(unit);
  batch.set(first.is_wide() ? &Matrix::Q_L : &Matrix::Q_R, Q);
  batch.set(first.is_wide() ? &Matrix::L : &Matrix::R, rotated(unit, Q));

  const auto [X, last, T, is_decomposed] = cholesky_rows(H);
  const at::Tensor inner = symmetric(full_product(T.mT(), T));
  const at::Tensor U = basis_of(inner);
  const at::Tensor trace = prior.mul(l).add_(gram_trace, gain / s);
  const at::Tensor core = rotated(inner, U);
  const at::Tensor seen =
      is_distinct(core.diagonal(0, 1, 2), at::zeros({1, 1}, core.options()), first.long_side());
  const at::Tensor basis = full_product(full_product(U.mT(), last), X)
                               .mul_(seen.unsqueeze(2))
                               .mul_(live_columns(H, Looks::kNever));
  const at::Tensor sound = is_decomposed.logical_and(is_sound(basis, seen));
  failures.add_(sound.logical_not());

  // Without a decomposition the long side starts flat.
  const at::Tensor weight = trace.reciprocal().mul_(gain / s);
  const at::Tensor new_core = at::zeros_like(batch.get(&Matrix::core));
  new_core.narrow(1, 0, size)
      .narrow(2, 0, size)
      .copy_(core.mul(seen.unsqueeze(1)).mul_(seen.unsqueeze(2)).mul_(of_matrix(weight)));
  const at::Tensor rho_short = gradients.tau.mul(norm.sqrt());
  const at::Tensor rho_long = gradients.tau.mul(trace.sqrt());
  batch.set(&Matrix::rho, first.is_wide() ? at::stack({rho_short, rho_long}, 1)
                                          : at::stack({rho_long, rho_short}, 1));
  batch.set(&Matrix::flat, at::where(sound, prior.div(trace), 1 / l).to(H.scalar_type()));
  batch.set(&Matrix::core, at::where(per_matrix(sound), new_core, 0));
  batch.set_part([&](const Matrix& w) { return w.basis.narrow(0, 0, size); },
                 at::where(per_matrix(sound), basis, 0));
  batch.set(&Matrix::refresh_fallbacks, batch.get(&Matrix::refresh_fallbacks).add(failures));
  batch.commit();
  for (const Matrix* w : batch.matrices()) w->rows[0] = w->rows[1] = size;
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
  const Side side = first.is_wide() ? Side::kRight : Side::kLeft;
  const int64_t rank = first.skinny_rank;
  const int64_t inner = first.rows[0];
  const int64_t used = first.rows[1];
  const int64_t kept = std::min(rank, used);
  const int64_t l = first.long_side();
  const auto rows_in = [](int64_t count) {
    return [count](const Matrix& w) { return w.basis.narrow(0, 0, count); };
  };

  // The factor is flat I + Z^T (F - flat I) Z, Z's first rows being the old basis.
  const at::Tensor flat = batch.get(&Matrix::flat);
  const at::Tensor rows = batch.get_part(rows_in(used));
  const auto [X, last, T, is_decomposed] =
      looks == Looks::kOnHost ? householder_rows(batch, side, rows) : cholesky_rows(rows);
  const at::Tensor core = batch.get(&Matrix::core);
  const at::Tensor used_core = core.narrow(1, 0, used).narrow(2, 0, used);
  const at::Tensor old_F = symmetric(full_product(full_product(T.mT(), used_core), T));
  old_F.diagonal(0, 1, 2).add_(flat.unsqueeze(1));
  // The mean eigenvalue outside of the first `count` directions of a factor with this diagonal.
  const auto mean_beyond = [&](const at::Tensor& diagonal, int64_t count) {
    return flat.mul(l - used)
        .add(diagonal.narrow(1, count, used - count).sum(1))
        .div(l - count)
        .unsqueeze(1);
  };
  const at::Tensor old_mean = mean_beyond(old_F.diagonal(0, 1, 2), inner);
  const auto [diagonal, order, P, F, is_turn, stays] = power_iteration(
      old_F, looks == Looks::kOnHost ? householder_orthonormalize : undamped_orthonormalize);
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
  const at::Tensor basis = full_product(full_product(P.narrow(2, 0, kept).mT(), last), X)
                               .mul_(seen.unsqueeze(2))
                               .mul_(live_columns(rows, looks));
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
  const at::Tensor sound = is_decomposed.logical_and(is_turn).logical_and_(is_sound(basis, seen));
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
    w->refreshes[static_cast<size_t>(side)] += 1;
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
