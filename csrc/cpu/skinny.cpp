#include "cpu/skinny.h"

#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/hardshrink.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/linalg.h"
#include "cpu/refresh.h"
#include "dykaf/bounds.h"
#include "dykaf/schedule.h"

namespace dykaf::cpu {
namespace {

at::Tensor symmetric(const at::Tensor& x) { return x.add(x.mT()).div_(2); }

// A QR on any device; on the CPU tried again in float64 where Q is not orthonormal.
struct JudgedQR {
  at::Tensor Q;
  at::Tensor R;
  at::Tensor sound;  // bool [...]; where false, Q and R are of no use
};

JudgedQR judged_qr(const at::Tensor& a) {
  const auto [Q, R] = signed_qr(a);
  const at::Tensor sound = is_orthonormal(Q);
  if (!a.device().is_cpu() || sound.all().item<bool>()) return {Q, R, sound};
  const auto [wide_Q, wide_R] = signed_qr(a.to(at::kDouble));
  return {wide_Q.to(a.scalar_type()), wide_R.to(a.scalar_type()), is_orthonormal(wide_Q)};
}

// Of a factor [..., n, n].
struct PowerIteration {
  at::Tensor diagonal;  // of the old factor, descending
  at::Tensor order;     // that sorts it
  at::Tensor P;         // what the basis is multiplied by
  at::Tensor F;         // in the new basis
  at::Tensor sound;     // bool [...]; where false, P and F are of no use
};

// As in refresh_basis.cpp (E9).
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

at::Tensor without_noise(const at::Tensor& x, const at::Tensor& noise) {
  return at::where(x.abs().lt(noise), at::zeros_like(x), x);
}

// 1 for the columns of x [..., k, l] with an entry that is not zero, else 0, [..., 1, l]. In the
// others weights have had no gradient: what a decomposition of x leaves there is rounding.
at::Tensor live_columns(const at::Tensor& x) {
  return x.abs().amax(-2, /*keepdim=*/true).gt(0).to(x.scalar_type());
}

// What lies outside of V, from sums of squares over a row and over its part in V: a mean over its
// coordinates, the same in any basis. Below the bound on the rounding of the difference it is not
// known.
at::Tensor mean_outside(const Options& options, const at::Tensor& total, const at::Tensor& inside,
                        int64_t num) {
  const double share = total.scalar_type() == at::kDouble ? least_outside<double>(options)
                                                          : least_outside<float>(options);
  return at::maximum(total.sub(inside), total.mul(share)).div_(num);
}

// M V^T of momenta [..., s, l] and [..., k, l] where it is more than rounding of M's rows.
at::Tensor momentum_in(const at::Tensor& V, const at::Tensor& exp_avg) {
  const at::Tensor lengths = exp_avg.square().sum(-1, /*keepdim=*/true).sqrt_();
  return without_noise(full_product(exp_avg, V.mT()), lengths.mul_(rounding_share_of(exp_avg, 1)));
}

// What a step leaves in the state; nothing of it is there yet.
struct SkinnyStep {
  at::Tensor update;  // before lr, [s, l], in the basis of the short side
  at::Tensor exp_avg;
  at::Tensor exp_avg_sq;
  double rms;
};

// X is the rotated gradient over tau.
template <typename T>
SkinnyStep adam_update(const Problem<T>& p, const SkinnyMatrix& w, const Options& options,
                       const at::Tensor& X, double tau, double noise) {
  const int64_t inner = w.rows[0];
  const at::Tensor V = w.basis.narrow(0, 0, inner);
  const at::Tensor XV =
      at::hardshrink(full_product(X, V.t()), noise * std::sqrt(static_cast<double>(X.size(1))));
  const at::Tensor rest = mean_outside(options, X.square().sum(1, /*keepdim=*/true),
                                       XV.square().sum(1, true), X.size(1) - inner)
                              .sqrt_();

  const double adam_tau = std::min(tau, largest_adam_tau<T>(p.m, p.n));
  const double step = static_cast<double>(*p.step) + 1;
  const double root = std::sqrt(1 - std::pow(options.beta2, step));
  const double correction = 1 - std::pow(options.beta1, step);
  const double bound = update_bound(options, step) * correction;
  SkinnyStep next;
  next.exp_avg_sq = w.exp_avg_sq.clone();
  const auto inverse_root = [&](at::Tensor second_moment, const at::Tensor& x) {
    second_moment.mul_(options.beta2).add_(x.mul(adam_tau).square_(), 1 - options.beta2);
    return second_moment.sqrt().div_(root).add_(options.eps).reciprocal_();
  };
  const at::Tensor within = inverse_root(next.exp_avg_sq.narrow(1, 0, inner), XV);
  const at::Tensor beyond = inverse_root(next.exp_avg_sq.narrow(1, w.rank, 1), rest);

  next.exp_avg = w.exp_avg.mul(options.beta1).add_(X.mul(adam_tau), 1 - options.beta1);
  // (M V^T within) V + (M - M V^T V) beyond.
  const at::Tensor MV = momentum_in(V, next.exp_avg);
  const at::Tensor of_V = MV.mul(within).clamp_(-bound, bound).sub_(MV.mul(beyond));
  next.update = next.exp_avg.mul(beyond).add_(full_product(of_V, V)).div_(correction);
  next.rms = std::sqrt(next.update.square().mean(at::kDouble).item<double>());
  return next;
}

// The averages of both sides, and the gradient's rows into the basis; gram is X X^T.
template <typename T>
void factor_update_(const Problem<T>& p, const SkinnyMatrix& w, const Options& options,
                    const at::Tensor& X, const at::Tensor& gram, const at::Tensor& unit_F,
                    double norm_F, double trace_gram, double tau) {
  double& rho_short = p.rho[w.is_tall ? 1 : 0];
  double& rho_long = p.rho[w.is_tall ? 0 : 1];
  const int64_t size = gram.size(0);
  if (norm_F > 0) {
    w.F.copy_(unit_F);
    rho_short = tau * std::sqrt(norm_F);
  }
  const double kept = options.factor_beta * (rho_long / tau) * (rho_long / tau);
  const double gain = (1 - options.factor_beta) / static_cast<double>(size);
  const double trace = kept + gain * trace_gram;
  if (!(trace > 0)) return;
  // In plain loops: torch would allocate the numbers.
  const auto decay = static_cast<T>(kept / trace);
  const int64_t num_rows = 2 * w.rank;
  *p.flat *= decay;
  for (int64_t i = 0; i < num_rows * num_rows; ++i) p.core[i] *= decay;
  w.basis.narrow(0, w.rows[1], size).copy_(X);
  for (int64_t i = w.rows[1]; i < w.rows[1] + size; ++i) {
    p.core[i * (num_rows + 1)] = static_cast<T>(gain / trace);
  }
  w.rows[1] += size;
  rho_long = tau * std::sqrt(trace);
}

}  // namespace

template <typename T>
SkinnyMatrix::SkinnyMatrix(const Problem<T>& p, at::Device device)
    : is_tall(p.m > p.n), rank(p.skinny_rank), rows(p.rows) {
  const int64_t s = p.short_side();
  const int64_t short_idx = is_tall ? 1 : 0;
  short_refreshes = p.refreshes + short_idx;
  long_refreshes = p.refreshes + (1 - short_idx);
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value).device(device);
  const auto tensor = [&](T* data, at::IntArrayRef shape) {
    return at::from_blob(data, shape, options);
  };
  F = tensor(is_tall ? p.R : p.L, {s, s});
  Q = tensor(is_tall ? p.Q_R : p.Q_L, {s, s});
  basis = tensor(p.basis, {2 * rank, p.long_side()});
  core = tensor(p.core, {2 * rank, 2 * rank});
  flat = tensor(p.flat, {});
  exp_avg = oriented(tensor(p.exp_avg, {p.m, p.n}));
  exp_avg_sq = tensor(p.exp_avg_sq, {s, rank + 1});
  step = at::from_blob(p.step, {}, options.dtype(at::kFloat));
  fallbacks = at::from_blob(p.refresh_fallbacks, {}, options.dtype(at::kLong));
}

template <typename T>
at::Tensor skinny_step_(const Problem<T>& p, const Options& options, const at::Tensor& H,
                        double tau) {
  const SkinnyMatrix w(p);
  const double largest = p.grad_max * std::abs(options.grad_scale) / tau;
  const double noise = largest * rounding_share<T>(p.rotated_side());
  const at::Tensor X = at::hardshrink(full_product(w.Q.t(), w.oriented(H)), noise);
  const SkinnyStep next = adam_update(p, w, options, X, tau, noise);
  const at::Tensor update = full_product(w.Q, next.update);

  const bool updates = updates_factors(p, options);
  const at::Tensor gram = updates ? full_product(X, X.t()) : w.F;
  const double rho = p.rho[w.is_tall ? 1 : 0];
  const at::Tensor F = w.F.mul(options.factor_beta * (rho / tau) * (rho / tau))
                           .add_(gram, (1 - options.factor_beta) / static_cast<double>(X.size(1)));
  const double norm = F.norm().item<double>();
  const double trace = gram.trace().item<double>();
  const at::Tensor unit_F = F.div(norm);

  // From here on nothing is allocated.
  *p.step += 1;
  *p.update_rms = static_cast<float>(next.rms);
  w.exp_avg.copy_(next.exp_avg);
  w.exp_avg_sq.copy_(next.exp_avg_sq);
  if (updates) factor_update_(p, w, options, X, gram, unit_F, norm, trace, tau);
  return w.oriented(update);
}

SkinnyStart initialize_skinny_(const SkinnyMatrix& w, const Options& options, const at::Tensor& H,
                               double tau) {
  const int64_t size = H.size(0);
  const auto s = static_cast<double>(size);
  const auto l = static_cast<double>(H.size(1));
  const double beta = options.factor_beta;
  const at::Tensor identity = at::eye(size, H.options());
  SkinnyStart start{};
  double& rho_short = start.rho[w.is_tall ? 1 : 0];
  double& rho_long = start.rho[w.is_tall ? 0 : 1];
  const auto basis_of = [&](const at::Tensor& factor) {
    if (const std::optional<Eigen> eigen = eigenvectors(factor)) return eigen->vectors;
    start.fallbacks += 1;
    return identity;
  };

  // The prior is a multiple of the identity whose trace is that of the gradient's term.
  const at::Tensor gram = full_product(H, H.t());
  const double gram_trace = gram.trace().item<double>();
  const double prior = beta > 0 ? (1 - beta) * gram_trace / (s * l) : 0;
  const at::Tensor F = gram.mul((1 - beta) / l).add_(identity, prior);
  const double norm = F.norm().item<double>();
  rho_short = tau * std::sqrt(norm);
  const at::Tensor unit = F.div(norm);
  w.Q.copy_(basis_of(unit));
  w.F.copy_(symmetric(full_product(w.Q.t(), full_product(unit, w.Q))));

  std::optional<QR> qr = checked_qr(H.t());
  if (!qr) {
    // Any orthonormal rows will do: what they do not see is the rest.
    start.fallbacks += 1;
    const at::Tensor units = at::eye(H.size(1), size, H.options());
    qr = QR{units, full_product(units.t(), H.t())};
  }
  const auto [Z, T] = *qr;
  const at::Tensor inner = full_product(T, T.t());
  const at::Tensor U = basis_of(inner);
  const double trace = prior * l + (1 - beta) * gram_trace / s;
  rho_long = tau * std::sqrt(trace);
  w.flat.fill_(prior / trace);
  at::Tensor core = symmetric(full_product(U.t(), full_product(inner, U)));
  const at::Tensor seen = is_distinct(core.diagonal(), at::zeros({}, core.options()), l);
  w.basis.narrow(0, 0, size).copy_(full_product(Z, U).mul_(seen).t().mul(live_columns(H)));
  core = core.mul_(seen).mul_(seen.unsqueeze(1));
  w.core.narrow(0, 0, size).narrow(1, 0, size).copy_(core.mul_((1 - beta) / (s * trace)));
  w.rows[0] = w.rows[1] = size;
  return start;
}

void bound_second_moment_(at::Tensor exp_avg_sq, const Options& options, const at::Tensor& exp_avg,
                          const at::Tensor& V, const at::Tensor& steps) {
  const int64_t inner = V.size(-2);
  const at::Tensor MV = momentum_in(V, exp_avg).square_();
  const at::Tensor outside = mean_outside(options, exp_avg.square().sum(-1, /*keepdim=*/true),
                                          MV.sum(-1, /*keepdim=*/true), exp_avg.size(-1) - inner);
  const at::Tensor factor =
      momentum_floors(options, steps).to(exp_avg.scalar_type()).unsqueeze(-1).unsqueeze(-1);
  const auto raise = [&](at::Tensor moment, const at::Tensor& square) {
    moment.copy_(at::maximum(moment, square.mul(factor)));
  };
  raise(exp_avg_sq.narrow(-1, 0, inner), MV);
  raise(exp_avg_sq.narrow(-1, exp_avg_sq.size(-1) - 1, 1), outside);
}

void refresh_short_(const SkinnyMatrix& w, const Options& options) {
  const auto [old_diagonal, order, P, F, sound] = power_iteration(w.F);
  if (!sound.item<bool>()) {
    *w.short_refreshes += 1;
    w.fallbacks.add_(1);
    return;
  }
  at::Tensor Q = full_product(w.Q, P);
  if ((*w.short_refreshes + 1) % kRefreshesPerCorrection == 0) Q = orthonormalized(Q);
  const at::Tensor exp_avg =
      without_noise(full_product(P.t(), w.exp_avg),
                    w.exp_avg.abs().amax().mul_(rounding_share_of(w.exp_avg, w.exp_avg.size(0))));
  const at::Tensor exp_avg_sq = w.exp_avg_sq.index_select(0, order).mul_(
      growth(options, old_diagonal, F.diagonal()).unsqueeze(1));
  bound_second_moment_(exp_avg_sq, options, exp_avg, w.basis.narrow(0, 0, w.rows[0]), w.step);

  *w.short_refreshes += 1;
  w.F.copy_(F);
  w.Q.copy_(Q);
  w.exp_avg.copy_(exp_avg);
  w.exp_avg_sq.copy_(exp_avg_sq);
}

void refresh_long_(std::span<const SkinnyMatrix> matrices, const Options& options) {
  const SkinnyMatrix& first = matrices[0];
  const int64_t rank = first.rank;
  const int64_t inner = first.rows[0];
  const int64_t used = first.rows[1];
  const int64_t kept = std::min(rank, used);
  const int64_t l = first.basis.size(1);
  const auto parts = [&](const auto& part) {
    std::vector<at::Tensor> tensors;
    for (const SkinnyMatrix& w : matrices) tensors.push_back(part(w));
    return tensors;
  };
  // An array of every matrix, or the same part of it, with the batch first.
  const auto stacked = [&](const auto& part) { return at::stack(parts(part)); };
  const auto basis_of = [&](const SkinnyMatrix& w) { return w.basis.narrow(0, 0, kept); };
  const auto core_of = [](const SkinnyMatrix& w) { return w.core; };
  const auto flat_of = [](const SkinnyMatrix& w) { return w.flat; };
  const auto exp_avg_sq_of = [](const SkinnyMatrix& w) { return w.exp_avg_sq; };

  // The factor is flat I + Z (F - flat I) Z^T, Z's first columns being the old basis.
  const at::Tensor flat = stacked(flat_of);
  const at::Tensor rows =
      stacked([&](const SkinnyMatrix& w) { return w.basis.narrow(0, 0, used); });
  const auto [Z, T, is_basis] = judged_qr(rows.mT());
  const at::Tensor core = stacked(core_of);
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
  const at::Tensor old_moments = stacked(exp_avg_sq_of);
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
  bound_second_moment_(moments, options, stacked([](const SkinnyMatrix& w) { return w.exp_avg; }),
                       basis, stacked([](const SkinnyMatrix& w) { return w.step; }));
  const at::Tensor new_core = at::zeros_like(core);
  const at::Tensor kept_core = new_core.narrow(1, 0, kept).narrow(2, 0, kept);
  kept_core.copy_(F.narrow(1, 0, kept).narrow(2, 0, kept));
  kept_core.diagonal(0, 1, 2).sub_(mean);
  kept_core.mul_(seen.unsqueeze(1)).mul_(seen.unsqueeze(2));

  // Where a decomposition failed the old basis stays, and the gradients since are forgotten.
  const at::Tensor sound = is_basis.logical_and(is_turn);
  const at::Tensor moves = sound.unsqueeze(1).unsqueeze(2);
  const auto within_inner = [&](const at::Tensor& x, int64_t rows, int64_t cols) {
    const at::Tensor old = at::zeros_like(x);
    old.narrow(1, 0, rows).narrow(2, 0, cols).copy_(x.narrow(1, 0, rows).narrow(2, 0, cols));
    return old;
  };
  const at::Tensor next_basis = at::where(moves, basis, within_inner(stacked(basis_of), inner, l));
  const at::Tensor next_core = at::where(moves, new_core, within_inner(core, inner, inner));
  const at::Tensor next_moments = at::where(moves, moments, old_moments);
  const at::Tensor next_flat = at::where(sound, mean.squeeze(1), flat);
  const at::Tensor failures = sound.logical_not().to(at::kLong);

  const auto assign = [&](const auto& part, const at::Tensor& values) {
    at::_foreach_copy_(parts(part), values.unbind(0));
  };
  assign(basis_of, next_basis);
  assign(core_of, next_core);
  assign(flat_of, next_flat);
  assign(exp_avg_sq_of, next_moments);
  at::_foreach_add_(parts([](const SkinnyMatrix& w) { return w.fallbacks; }), failures.unbind(0));
  for (const SkinnyMatrix& w : matrices) {
    *w.long_refreshes += 1;
    w.rows[0] = w.rows[1] = kept;
  }
}

void forget_gradients_(const SkinnyMatrix& w) {
  const int64_t inner = w.rows[0];
  w.core.narrow(0, inner, w.core.size(0) - inner).zero_();
  w.core.narrow(1, inner, w.core.size(1) - inner).zero_();
  w.rows[1] = inner;
}

template SkinnyMatrix::SkinnyMatrix(const Problem<float>&, at::Device);
template SkinnyMatrix::SkinnyMatrix(const Problem<double>&, at::Device);
template at::Tensor skinny_step_(const Problem<float>&, const Options&, const at::Tensor&, double);
template at::Tensor skinny_step_(const Problem<double>&, const Options&, const at::Tensor&, double);

}  // namespace dykaf::cpu
