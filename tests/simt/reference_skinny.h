// The step of a skinny matrix, and of any, in the manner of reference_ops.h.
#pragma once

#include "reference_ops.h"

namespace kernel_check::reference {

inline Dense top_rows(const Dense& A, int64_t num) {
  Dense top(num, A.n);
  std::copy_n(A.x.begin(), num * A.n, top.x.begin());
  return top;
}

// The least power of two that is not below the gradient's largest entry and both rho; 1 for zero.
inline double gradient_scale(const Matrix& p, const Settings& settings) {
  double largest = std::max(p.rho[0].value, p.rho[1].value);
  for (const Number& g : p.grad.x) {
    largest = std::max(largest, std::fabs(g.value * settings.grad_scale));
  }
  return largest > 0 ? std::exp2(std::ceil(std::log2(largest))) : 1;
}

inline Number sum_of_squares(const Dense& A, int64_t row) {
  Number sum;
  for (int64_t j = 0; j < A.n; ++j) {
    const Number square = A.at(row, j) * A.at(row, j);
    sum.value += square.value;
    sum.error += square.error;
  }
  return sum;
}

// With X [s, l], the gradient in the short side's basis; returns the update in that basis, [s, l].
inline Dense skinny_adam_update(Matrix& p, Dense& exp_avg, const Dense& X,
                                const Settings& settings) {
  const Options& options = settings.options;
  p.step += 1;
  const int64_t rank = p.exp_avg_sq.n - 1;
  const Numerator numerator(p, options);
  const Number correction2 = Number(1 / std::sqrt(1 - std::pow(options.beta2, p.step))).rounded();
  const Number beta2 = Number(options.beta2).rounded();
  const Number gain2 = Number(1 - options.beta2).rounded();
  exp_avg =
      combined(Number(options.beta1).rounded(), exp_avg, Number(1 - options.beta1).rounded(), X);
  const Dense V = top_rows(p.basis, p.inner);
  const double in_V = noise(p, settings) * std::sqrt(static_cast<double>(X.n));
  const Dense XV = without_noise(multiplied(X, transposed(V), MatmulPrecision::kHighest), in_V);
  Dense MV = multiplied(exp_avg, transposed(V), MatmulPrecision::kHighest);
  const auto inverse_root = [&](Number& second_moment, Number g) {
    second_moment = beta2 * second_moment + gain2 * g * g;
    return 1 / ((sqrt(second_moment) * correction2).rounded() + Number(options.eps).rounded());
  };
  const double bound = update_bound(options, p.step);
  Dense beyond(1, X.m);
  for (int64_t i = 0; i < X.m; ++i) {
    const Number total = sum_of_squares(X, i);
    const double momentum_noise = 16 * kRoundoff * sqrt(sum_of_squares(exp_avg, i)).value;
    const Number outside = total - sum_of_squares(XV, i);
    const Number floor = Number(4 * 0x1p-23) * total;
    const Number rest =
        sqrt((outside.value > floor.value ? outside : floor) / static_cast<double>(X.n - p.inner));
    beyond.at(0, i) = inverse_root(p.exp_avg_sq.at(i, rank), rest);
    for (int64_t j = 0; j < p.inner; ++j) {
      const Number within = inverse_root(p.exp_avg_sq.at(i, j), XV.at(i, j));
      const Number known =
          numerator.of(kernel_check::without_noise(MV.at(i, j), momentum_noise), XV.at(i, j));
      MV.at(i, j) = clamped(known * within, bound) - known * beyond.at(0, i);
    }
  }
  Dense D = multiplied(MV, V, MatmulPrecision::kHighest);
  for (int64_t i = 0; i < D.m; ++i) {
    for (int64_t j = 0; j < D.n; ++j) {
      D.at(i, j) = D.at(i, j) + numerator.of(exp_avg.at(i, j), X.at(i, j)) * beyond.at(0, i);
    }
  }
  p.update_rms = sqrt(inner(D, D) / static_cast<double>(D.m * D.n));
  return D;
}

// The average of both sides, H = X / tau [s, l].
inline void skinny_factor_update(Matrix& p, const Dense& H, double tau, const Settings& settings,
                                 bool is_wide) {
  const double beta = settings.options.factor_beta;
  const auto s = static_cast<double>(H.m);
  Dense& F = is_wide ? p.L : p.R;
  average(F, p.rho[is_wide ? 0 : 1], multiplied(H, transposed(H), settings.precision),
          static_cast<double>(H.n), beta, tau);

  Number& rho = p.rho[is_wide ? 1 : 0];
  const Number kept = Number(beta) * (rho / tau) * (rho / tau);
  Number total;
  for (int64_t i = 0; i < H.m; ++i) total = total + sum_of_squares(H, i);
  const Number trace = kept + Number((1 - beta) / s) * total;
  const Number decay = kept / trace;
  for (Number& entry : p.core.x) entry = decay * entry;
  for (int64_t i = 0; i < H.m; ++i) {
    p.core.at(p.used + i, p.used + i) = Number((1 - beta) / s) / trace;
    for (int64_t j = 0; j < H.n; ++j) p.basis.at(p.used + i, j) = H.at(i, j);
  }
  p.flat = decay * p.flat;
  rho = Number(tau) * sqrt(trace);
}

inline void skinny_step(Matrix& p, const Settings& settings) {
  const bool is_wide = p.grad.m < p.grad.n;
  const auto oriented = [&](const Dense& A) { return is_wide ? A : transposed(A); };
  const double tau = gradient_scale(p, settings);
  const Dense X = without_noise(
      oriented(rotate(p, Rotation::kIntoBasis, gradient(p, settings), settings.precision)),
      noise(p, settings));
  Dense exp_avg = oriented(p.exp_avg);
  const Dense D = oriented(skinny_adam_update(p, exp_avg, X, settings));
  p.exp_avg = oriented(exp_avg);
  apply_update(p, rotate(p, Rotation::kOutOfBasis, D, settings.precision), settings);
  Dense H = X;
  for (Number& h : H.x) h = {h.value / tau, h.error / tau};
  skinny_factor_update(p, H, tau, settings, is_wide);
}

// The whole step.
inline void step(Matrix& p, const Settings& settings) {
  if (!p.basis.is_null()) return skinny_step(p, settings);
  const Dense G = rotate(p, Rotation::kIntoBasis, gradient(p, settings), settings.precision);
  Dense D = adam_update(p, G, settings);
  if (settings.options.orthogonalize > 0 && p.is_matrix) D = orthogonalized(p, D, settings);
  apply_update(p, rotate(p, Rotation::kOutOfBasis, D, settings.precision), settings);
  if (!p.L.is_null() || !p.R.is_null()) factor_update(p, G, settings);
}

}  // namespace kernel_check::reference
