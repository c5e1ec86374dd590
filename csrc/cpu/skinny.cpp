#include "cpu/skinny.h"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/linalg.h"
#include "cpu/refresh.h"
#include "dykaf/schedule.h"

namespace dykaf::cpu {
namespace {

at::Tensor symmetric(const at::Tensor& x) { return x.add(x.mT()).div_(2); }

// Of a factor [..., n, n].
struct PowerIteration {
  at::Tensor diagonal;  // of the old factor, descending
  at::Tensor order;     // that sorts it
  at::Tensor P;         // what the basis is multiplied by
  at::Tensor F;         // in the new basis
};

// As in refresh_basis.cpp (E9).
PowerIteration power_iteration(const at::Tensor& F) {
  const auto [diagonal, order] =
      at::sort(F.diagonal(0, -2, -1), /*stable=*/true, /*dim=*/-1, /*descending=*/true);
  const auto [P, S] = signed_qr(F.gather(-1, order.unsqueeze(-2).expand_as(F)));
  const at::Tensor sorted = P.gather(-2, order.unsqueeze(-1).expand_as(P));
  return {diagonal, order, P, symmetric(at::matmul(S, sorted))};
}

// The update before lr, [s, l], in the basis of the short side; X is the rotated gradient over tau.
template <typename T>
at::Tensor adam_update_(const Problem<T>& p, const SkinnyMatrix& w, const Options& options,
                        const at::Tensor& X, double tau) {
  const int64_t inner = w.rows[0];
  const at::Tensor V = w.basis.narrow(0, 0, inner);
  const at::Tensor XV = X.mm(V.t());

  // What lies outside of V: a mean over its coordinates, the same in any basis. Below the bound on
  // the rounding of the difference it is not known.
  const double rounding = X.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                         : std::numeric_limits<float>::epsilon();
  const at::Tensor total = X.square().sum(1, /*keepdim=*/true);
  const at::Tensor outside = total.sub(XV.square().sum(1, true));
  const at::Tensor rest =
      at::maximum(outside, total.mul(4 * rounding)).div_(X.size(1) - inner).sqrt_();

  const double step = *p.step += 1;
  const double root = std::sqrt(1 - std::pow(options.beta2, step));
  // Squares after the scaling: what overflows is infinite, never NaN.
  const auto inverse_root = [&](at::Tensor second_moment, const at::Tensor& x) {
    second_moment.mul_(options.beta2).add_(x.mul(tau).square_(), 1 - options.beta2);
    return second_moment.sqrt().div_(root).add_(options.eps).reciprocal_();
  };
  const at::Tensor within = inverse_root(w.exp_avg_sq.narrow(1, 0, inner), XV);
  const at::Tensor beyond = inverse_root(w.exp_avg_sq.narrow(1, w.rank, 1), rest);

  w.exp_avg.mul_(options.beta1).add_(X.mul(tau), 1 - options.beta1);
  // (M V^T within) V + (M - M V^T V) beyond.
  const at::Tensor MV = w.exp_avg.mm(V.t());
  at::Tensor update = w.exp_avg.mul(beyond).addmm_(MV.mul_(within.sub(beyond)), V);
  update.div_(1 - std::pow(options.beta1, step));
  *p.update_rms = static_cast<float>(std::sqrt(update.square().mean(at::kDouble).item<double>()));
  return update;
}

// The averages of both sides, and the gradient's rows into the basis.
template <typename T>
void factor_update_(const Problem<T>& p, const SkinnyMatrix& w, const Options& options,
                    const at::Tensor& X, double tau) {
  double& rho_short = p.rho[w.is_tall ? 1 : 0];
  double& rho_long = p.rho[w.is_tall ? 0 : 1];
  const double beta = options.factor_beta;
  const int64_t size = X.size(0);
  const auto s = static_cast<double>(size);
  const auto l = static_cast<double>(X.size(1));
  const auto kept = [&](double rho) { return beta * (rho / tau) * (rho / tau); };

  const at::Tensor gram = X.mm(X.t());
  const at::Tensor F = w.F.mul(kept(rho_short)).add_(gram, (1 - beta) / l);
  const double norm = F.norm().item<double>();
  if (norm > 0) {
    w.F.copy_(F.div(norm));
    rho_short = tau * std::sqrt(norm);
  }

  const double gain = (1 - beta) / s;
  const double trace = kept(rho_long) + gain * gram.trace().item<double>();
  if (!(trace > 0)) return;
  const double decay = kept(rho_long) / trace;
  w.flat.mul_(decay);
  w.core.mul_(decay);
  w.basis.narrow(0, w.rows[1], size).copy_(X);
  w.core.diagonal().narrow(0, w.rows[1], size).fill_(gain / trace);
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
}

template <typename T>
at::Tensor skinny_step_(const Problem<T>& p, const Options& options, const at::Tensor& H,
                        double tau) {
  const SkinnyMatrix w(p);
  const at::Tensor X = w.Q.t().mm(w.oriented(H));
  const at::Tensor update = w.Q.mm(adam_update_(p, w, options, X, tau));
  if (updates_factors(p, options)) factor_update_(p, w, options, X, tau);
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
    if (const std::optional<at::Tensor> vectors = eigenvectors(factor)) return *vectors;
    start.fallbacks += 1;
    return identity;
  };

  // The prior is a multiple of the identity whose trace is that of the gradient's term.
  const at::Tensor gram = H.mm(H.t());
  const double gram_trace = gram.trace().item<double>();
  const double prior = beta > 0 ? (1 - beta) * gram_trace / (s * l) : 0;
  const at::Tensor F = gram.mul((1 - beta) / l).add_(identity, prior);
  const double norm = F.norm().item<double>();
  rho_short = tau * std::sqrt(norm);
  const at::Tensor unit = F.div(norm);
  w.Q.copy_(basis_of(unit));
  w.F.copy_(symmetric(w.Q.t().mm(unit).mm(w.Q)));

  const auto [Z, T] = signed_qr(H.t());
  const at::Tensor inner = T.mm(T.t());
  const at::Tensor U = basis_of(inner);
  const double trace = prior * l + (1 - beta) * gram_trace / s;
  rho_long = tau * std::sqrt(trace);
  w.flat.fill_(prior / trace);
  w.basis.narrow(0, 0, size).copy_(Z.mm(U).t());
  at::Tensor core = w.core.narrow(0, 0, size).narrow(1, 0, size);
  core.copy_(symmetric(U.t().mm(inner).mm(U)).mul_((1 - beta) / (s * trace)));
  w.rows[0] = w.rows[1] = size;
  return start;
}

void refresh_short_(const SkinnyMatrix& w, const Options& options) {
  const auto [old_diagonal, order, P, F] = power_iteration(w.F);
  w.F.copy_(F);
  w.Q.copy_(w.Q.mm(P));
  *w.short_refreshes += 1;
  if (*w.short_refreshes % kRefreshesPerCorrection == 0) w.Q.copy_(orthonormalized(w.Q));
  w.exp_avg.copy_(P.t().mm(w.exp_avg));
  w.exp_avg_sq.copy_(w.exp_avg_sq.index_select(0, order).mul(
      growth(options, old_diagonal, w.F.diagonal()).unsqueeze(1)));
}

void refresh_long_(std::span<const SkinnyMatrix> matrices, const Options& options) {
  const SkinnyMatrix& first = matrices[0];
  const int64_t rank = first.rank;
  const int64_t inner = first.rows[0];
  const int64_t used = first.rows[1];
  const int64_t kept = std::min(rank, used);
  const int64_t l = first.basis.size(1);
  // An array of every matrix, or the same part of it, with the batch first; and back.
  const auto stacked = [&](const auto& part) {
    std::vector<at::Tensor> parts;
    for (const SkinnyMatrix& w : matrices) parts.push_back(part(w));
    return at::stack(parts);
  };
  const auto assign = [&](const auto& part, const at::Tensor& values) {
    std::vector<at::Tensor> parts;
    for (const SkinnyMatrix& w : matrices) parts.push_back(part(w));
    at::_foreach_copy_(parts, values.unbind(0));
  };

  // The factor is flat I + Z (F - flat I) Z^T, Z's first columns being the old basis.
  const at::Tensor flat = stacked([](const SkinnyMatrix& w) { return w.flat; });
  const auto [Z, T] =
      signed_qr(stacked([&](const SkinnyMatrix& w) { return w.basis.narrow(0, 0, used); }).mT());
  const at::Tensor core =
      stacked([&](const SkinnyMatrix& w) { return w.core.narrow(0, 0, used).narrow(1, 0, used); });
  const at::Tensor old_F = symmetric(at::matmul(at::matmul(T, core), T.mT()));
  old_F.diagonal(0, 1, 2).add_(flat.unsqueeze(1));
  // The mean eigenvalue outside of the first `count` directions of a factor with this diagonal.
  const auto mean_beyond = [&](const at::Tensor& diagonal, int64_t count) {
    return flat.mul(l - used)
        .add(diagonal.narrow(1, count, used - count).sum(1))
        .div(l - count)
        .unsqueeze(1);
  };
  const at::Tensor old_mean = mean_beyond(old_F.diagonal(0, 1, 2), inner);
  const auto [diagonal, order, P, F] = power_iteration(old_F);
  const at::Tensor new_diagonal = F.diagonal(0, 1, 2).narrow(1, 0, kept);
  const at::Tensor mean = mean_beyond(F.diagonal(0, 1, 2), kept);

  // A direction that was in no basis had the second moment and the eigenvalue of the rest.
  const at::Tensor chosen = order.narrow(1, 0, kept);
  const at::Tensor exp_avg_sq = stacked([](const SkinnyMatrix& w) { return w.exp_avg_sq; });
  const at::Tensor rest = exp_avg_sq.narrow(2, rank, 1);
  const at::Tensor old_columns =
      at::cat({exp_avg_sq.narrow(2, 0, inner), rest.expand({-1, -1, used - inner})}, 2);
  const at::Tensor old_eigenvalues =
      at::where(chosen.lt(inner), diagonal.narrow(1, 0, kept), old_mean);
  const at::Tensor columns =
      old_columns.gather(2, chosen.unsqueeze(1).expand({-1, old_columns.size(1), -1}))
          .mul_(growth(options, old_eigenvalues, new_diagonal).unsqueeze(1));
  rest.mul_(growth(options, old_mean, mean).unsqueeze(1));
  exp_avg_sq.narrow(2, 0, kept).copy_(columns);
  assign([](const SkinnyMatrix& w) { return w.exp_avg_sq; }, exp_avg_sq);

  assign([&](const SkinnyMatrix& w) { return w.basis.narrow(0, 0, kept); },
         at::matmul(Z, P.narrow(2, 0, kept)).mT());
  const at::Tensor new_core = F.new_zeros({F.size(0), 2 * rank, 2 * rank});
  const at::Tensor inner_core = new_core.narrow(1, 0, kept).narrow(2, 0, kept);
  inner_core.copy_(F.narrow(1, 0, kept).narrow(2, 0, kept));
  inner_core.diagonal(0, 1, 2).sub_(mean);
  assign([](const SkinnyMatrix& w) { return w.core; }, new_core);
  assign([](const SkinnyMatrix& w) { return w.flat; }, mean.squeeze(1));
  for (const SkinnyMatrix& w : matrices) {
    *w.long_refreshes += 1;
    w.rows[0] = w.rows[1] = kept;
  }
}

template SkinnyMatrix::SkinnyMatrix(const Problem<float>&, at::Device);
template SkinnyMatrix::SkinnyMatrix(const Problem<double>&, at::Device);
template at::Tensor skinny_step_(const Problem<float>&, const Options&, const at::Tensor&, double);
template at::Tensor skinny_step_(const Problem<double>&, const Options&, const at::Tensor&, double);

}  // namespace dykaf::cpu
