// docs/algorithm.md in plain loops over numbers with error bounds, one matrix at a time.
#pragma once

#include "bounded.h"
#include "dykaf/newton_schulz.h"
#include "dykaf/types.h"

namespace kernel_check::reference {

using dykaf::Integrator;
using dykaf::NewtonSchulz;
using dykaf::Options;
using dykaf::Rotation;
using dykaf::SecondMoment;
using dykaf::cuda::MatmulPrecision;

// A matrix of the model and its state. A null matrix is absent.
struct Matrix {
  Dense grad;   // as stored
  Dense param;  // the master if there is one; before the rounding to its dtype
  Dense exp_avg, exp_avg_sq;
  Dense row, col;  // [1, m] and [1, n]
  Number scale;
  Dense L, R, Q_L, Q_R;
  Number rho[2];
  bool is_matrix = false;
  double step = 0;
  Number update_rms;

  // Of a skinny matrix.
  Dense basis, core;
  Number flat;
  int64_t inner = 0;
  int64_t used = 0;
};

// What a step hangs on beside the matrix.
struct Settings {
  Options options;
  double grad_scale;  // all in all
  dykaf::Rate rate;
  MatmulPrecision precision;
};

inline Dense gradient(const Matrix& p, const Settings& settings) {
  Dense G = p.grad;
  for (Number& g : G.x) g = Number(settings.grad_scale).rounded() * g;
  return G;
}

inline double largest_gradient(const Matrix& p, const Settings& settings) {
  double largest = 0;
  for (const Number& g : p.grad.x) {
    largest = std::max(largest, std::fabs(g.value * settings.grad_scale));
  }
  return largest;
}

// Entries of the rotated gradient that are smaller are rounding (docs/algorithm.md).
inline double noise(const Matrix& p, const Settings& settings) {
  const auto side = static_cast<double>(std::max(p.Q_L.m, p.Q_R.m));
  return 16 * kRoundoff * std::sqrt(side) * largest_gradient(p, settings);
}

inline Dense without_noise(Dense x, double noise) {
  for (Number& entry : x.x) entry = kernel_check::without_noise(entry, noise);
  return x;
}

// Of an entry of Adam's update (docs/algorithm.md, "The bound").
inline double update_bound(const Options& options, double step) {
  const double q = options.beta1 * options.beta1 / options.beta2;
  double sum = 0;
  for (double k = 0; k < step; ++k) sum += std::pow(q, k);
  double C = (1 - options.beta1) * (1 - options.beta1) / (1 - options.beta2) * sum;
  if (q >= 1) C = std::min(C, 1.0);
  const double left = 1 - std::pow(options.beta2, step);
  const double bound = std::sqrt(C * left) / (1 - std::pow(options.beta1, step));
  if (!options.nesterov) return bound;
  return options.beta1 * bound + (1 - options.beta1) * std::sqrt(left / (1 - options.beta2));
}

// Adam's numerator is momentum exp_avg + gradient G.
struct Numerator {
  Number momentum;
  Number gradient;

  Numerator(const Matrix& p, const Options& options) {
    const bool is_nesterov = options.nesterov && p.is_matrix;
    const double correction = 1 / (1 - std::pow(options.beta1, p.step));
    momentum = Number(is_nesterov ? options.beta1 * correction : correction).rounded();
    if (is_nesterov) gradient = Number(1 - options.beta1).rounded();
  }
  Number of(Number exp_avg, Number g) const { return momentum * exp_avg + gradient * g; }
};

inline Dense rotate(const Matrix& p, Rotation rotation, Dense X, MatmulPrecision precision) {
  const bool into = rotation == Rotation::kIntoBasis;
  if (!p.Q_L.is_null()) X = multiplied(into ? transposed(p.Q_L) : p.Q_L, X, precision);
  if (!p.Q_R.is_null()) X = multiplied(X, into ? p.Q_R : transposed(p.Q_R), precision);
  return X;
}

// (G o G) x, x [1, n]; transposed: x (G o G), x [1, m]. In double on the device.
inline Dense squared_times(const Dense& G, const Dense& x) {
  Dense y(1, G.m);
  for (int64_t i = 0; i < G.m; ++i) {
    for (int64_t j = 0; j < G.n; ++j) {
      const Number term = G.at(i, j) * G.at(i, j) * x.at(0, j);
      y.at(0, i).value += term.value;
      y.at(0, i).error += term.error;
    }
  }
  return y;
}

inline Dense constant(int64_t n, double value) {
  Dense x(1, n);
  for (Number& entry : x.x) entry = value;
  return x;
}

inline Dense scaled(Number a, Dense x) {
  for (Number& entry : x.x) entry = a * entry;
  return x;
}

// sigma^2 l r^T, by a rank-one splitting step with the target beta2 V + (1 - beta2) G o G.
inline void rank_one_step(Matrix& p, const Dense& G, double beta2) {
  if (p.scale.value == 0) {
    p.row = constant(G.m, 1 / std::sqrt(static_cast<double>(G.m)));
    p.col = constant(G.n, 1 / std::sqrt(static_cast<double>(G.n)));
  }
  const Number a = Number(beta2) * p.scale * p.scale;
  const Number b = 1 - beta2;
  const Dense K = combined(a, p.row, b, squared_times(G, p.col));
  const Number norm_K = sqrt(inner(K, K));
  if (!(norm_K.value > 0)) return;
  const Dense u = scaled(1 / norm_K, K);
  const Number c = a * inner(u, p.row);
  const Dense B = combined(c, p.col, b, squared_times(transposed(G), u));
  const Number s = sqrt(inner(B, B));
  if (!(s.value > 0)) return;
  p.row = u;
  p.col = scaled(1 / s, B);
  p.scale = sqrt(s);
}

// The root of the second moment, brought forward; a full one without the noise in G.
inline Dense second_moment_root(Matrix& p, const Dense& G, const Dense& known,
                                const Options& options) {
  Dense root(G.m, G.n);
  if (!p.exp_avg_sq.is_null()) {
    for (size_t i = 0; i < root.x.size(); ++i) {
      const Number old = Number(options.beta2).rounded() * p.exp_avg_sq.x[i];
      p.exp_avg_sq.x[i] = old + Number(1 - options.beta2).rounded() * known.x[i] * known.x[i];
      root.x[i] = sqrt(p.exp_avg_sq.x[i]);
    }
    return root;
  }
  if (options.second_moment == SecondMoment::kRankOne) {
    rank_one_step(p, G, options.beta2);
    for (int64_t i = 0; i < G.m; ++i) {
      for (int64_t j = 0; j < G.n; ++j) {
        root.at(i, j) = p.scale * sqrt(p.row.at(0, i)) * sqrt(p.col.at(0, j));
      }
    }
    return root;
  }
  const auto m = static_cast<double>(G.m);
  const auto n = static_cast<double>(G.n);
  const double gain = 1 - options.beta2;
  p.row = combined(options.beta2, p.row, gain / n, squared_times(G, constant(G.n, 1)));
  p.col = combined(options.beta2, p.col, gain / m, squared_times(transposed(G), constant(G.m, 1)));
  Number mean;
  for (const Number& entry : p.row.x) mean = mean + entry / m;
  if (mean.value == 0) return root;
  for (int64_t i = 0; i < G.m; ++i) {
    for (int64_t j = 0; j < G.n; ++j) {
      root.at(i, j) = sqrt(p.row.at(0, i) * p.col.at(0, j) / mean);
    }
  }
  return root;
}

// Adam with the rotated gradient G; returns D.
inline Dense adam_update(Matrix& p, const Dense& G, const Settings& settings) {
  const Options& options = settings.options;
  p.step += 1;
  const Dense known = without_noise(G, noise(p, settings));
  const bool is_compact = !p.row.is_null();
  const bool is_momentum = p.exp_avg_sq.is_null() && !is_compact;
  const Dense root = is_momentum ? Dense(G.m, G.n) : second_moment_root(p, G, known, options);
  const double bound = update_bound(options, p.step);
  const Numerator numerator(p, options);
  const Number correction2 = Number(1 / std::sqrt(1 - std::pow(options.beta2, p.step))).rounded();
  const Number beta1 = Number(options.beta1).rounded();
  const Number gain1 = Number(1 - options.beta1).rounded();
  Dense D(G.m, G.n);
  for (size_t i = 0; i < D.x.size(); ++i) {
    p.exp_avg.x[i] = beta1 * p.exp_avg.x[i] + gain1 * known.x[i];
    D.x[i] = numerator.of(p.exp_avg.x[i], known.x[i]);
    if (is_momentum) continue;
    // One rounding more for products that the device groups in another way.
    const Number denominator = (root.x[i] * correction2).rounded() + Number(options.eps).rounded();
    D.x[i] = D.x[i] / denominator;
    if (is_compact) D.x[i] = clamped(D.x[i], bound);
  }
  p.update_rms = sqrt(inner(D, D) / static_cast<double>(G.m * G.n));
  return D;
}

// The root mean square of Adam's direction for gradients that are independent signs, after many.
inline double rms_of_noise(const Options& options) {
  double squares = 0;
  for (int k = 0; k < 3000; ++k) {
    double weight = (1 - options.beta1) * std::pow(options.beta1, k);
    if (options.nesterov) weight = options.beta1 * weight + (k == 0 ? 1 - options.beta1 : 0);
    squares += weight * weight;
  }
  return std::sqrt(squares);
}

// 0.2 sqrt(max(m, n)) times D / ||D|| after Newton-Schulz steps; less where D is less than noise.
inline Dense orthogonalized(Matrix& p, const Dense& D, const Settings& settings) {
  const auto size = static_cast<double>(D.m * D.n);
  // Through update_rms in float32.
  const Number norm =
      sqrt(inner(D, D) / size).rounded() * Number(std::sqrt(size)).rounded().rounded();
  const bool is_tall = D.m > D.n;
  Dense X = is_tall ? transposed(D) : D;
  if (norm.value != 0) X = scaled(1 / norm, X);
  for (int64_t k = 0; k < settings.options.orthogonalize; ++k) {
    Dense A = multiplied(X, transposed(X), settings.precision);
    if (k == 0 && settings.options.second_moment != SecondMoment::kNone && norm.value != 0) {
      const Number bound = sqrt(inner(A, A)).rounded();
      A = scaled(1 / bound, A);
      X = scaled(sqrt(1 / bound), X);
    }
    const Dense B =
        combined(Number(NewtonSchulz::kB).rounded(), A, Number(NewtonSchulz::kC).rounded(),
                 multiplied(A, A, settings.precision));
    X = combined(Number(NewtonSchulz::kA).rounded(), X, 1, multiplied(B, X, settings.precision));
  }
  X = scaled(Number(0.2 * std::sqrt(static_cast<double>(std::max(D.m, D.n)))).rounded().rounded(),
             X);
  if (settings.options.second_moment != SecondMoment::kNone) {
    const Number share = sqrt(inner(D, D) / size).rounded() / rms_of_noise(settings.options);
    if (share.value < 1) X = scaled(share.rounded(), X);
  }
  p.update_rms = sqrt(inner(X, X) / size);
  return is_tall ? transposed(X) : X;
}

inline void apply_update(Matrix& p, const Dense& D, const Settings& settings) {
  const Number keep = Number(1 - settings.rate.lr * settings.rate.weight_decay).rounded();
  for (size_t i = 0; i < D.x.size(); ++i) {
    p.param.x[i] = keep * p.param.x[i] - Number(settings.rate.lr).rounded() * D.x[i];
  }
}

// Inner products of a F + b A, as sums of non-negative terms.
inline Number blended_norm(const Dense& F, const Dense& A, Number a, Number b) {
  return sqrt(a * a * inner(F, F) + Number(2) * a * b * inner(F, A) + b * b * inner(A, A));
}

inline Dense normalised(const Dense& F, const Dense& A, Number a, Number b, Number norm) {
  return combined(a / norm, F, b / norm, A);
}

inline void ksl(Matrix& p, const Dense& H, Number a, Number b, double tau,
                MatmulPrecision precision) {
  const Dense Ht = transposed(H);
  const Dense A = multiplied(multiplied(H, p.R, precision), Ht, precision);
  const Number norm_K = blended_norm(p.L, A, a, b);
  if (!(norm_K.value > 0)) return;
  const Number c = a * (a * inner(p.L, p.L) + b * inner(p.L, A)) / norm_K;
  p.L = normalised(p.L, A, a, b, norm_K);
  const Dense increment = multiplied(Ht, multiplied(p.L, H, precision), precision);
  const Number s = blended_norm(p.R, increment, c, b);
  p.R = normalised(p.R, increment, c, b, s);
  p.rho[0] = p.rho[1] = Number(tau) * sqrt(s);
}

inline void bug(Matrix& p, const Dense& H, Number a, Number b, double tau,
                MatmulPrecision precision) {
  const Dense Ht = transposed(H);
  const Dense A = multiplied(multiplied(H, p.R, precision), Ht, precision);
  const Dense B = multiplied(Ht, multiplied(p.L, H, precision), precision);
  const Number q = inner(multiplied(A, H, precision), multiplied(H, B, precision));
  const Number norm_K = blended_norm(p.L, A, a, b);
  const Number norm_J = blended_norm(p.R, B, a, b);
  if (!(norm_K.value > 0 && norm_J.value > 0)) return;
  const Number LK = a * inner(p.L, p.L) + b * inner(p.L, A);
  const Number RJ = a * inner(p.R, p.R) + b * inner(p.R, B);
  const Number gradient_terms =
      a * a * inner(p.L, A) + a * b * (inner(A, A) + inner(B, B)) + b * b * q;
  const Number s = (a * LK * RJ + b * gradient_terms) / (norm_K * norm_J);
  p.L = normalised(p.L, A, a, b, norm_K);
  p.R = normalised(p.R, B, a, b, norm_J);
  p.rho[0] = p.rho[1] = Number(tau) * sqrt(s);
}

// rho^2 F towards G G^T / size, of which `increment` is the product.
inline void average(Dense& F, Number& rho, const Dense& increment, double size, double beta,
                    double tau) {
  const Number a = Number(beta) * (rho / tau) * (rho / tau);
  const Number b = (1 - beta) / size;
  const Number norm = blended_norm(F, increment, a, b);
  if (!(norm.value > 0)) return;
  F = normalised(F, increment, a, b, norm);
  rho = Number(tau) * sqrt(norm);
}

inline void diagonal(Matrix& p, const Dense& H, double tau, const Options& options,
                     MatmulPrecision precision) {
  average(p.L, p.rho[0], multiplied(H, transposed(H), precision), static_cast<double>(H.n),
          options.factor_beta, tau);
  average(p.R, p.rho[1], multiplied(transposed(H), H, precision), static_cast<double>(H.m),
          options.factor_beta, tau);
}

// With the rotated gradient G.
inline void factor_update(Matrix& p, const Dense& G, const Settings& settings) {
  const double beta = settings.options.factor_beta;
  double largest = 0;
  for (const Number& g : G.x) largest = std::max(largest, std::fabs(g.value));
  if (largest == 0) {
    for (Number& rho : p.rho) rho = rho * Number(std::sqrt(beta));
    return;
  }
  // Any tau will do here.
  const double tau = std::max(largest, std::max(p.rho[0].value, p.rho[1].value));
  Dense H = G;
  for (Number& h : H.x) h = {h.value / tau, h.error / tau};
  const Number a = Number(beta) * (p.rho[0] / tau) * (p.rho[0] / tau);
  const Number b = 1 - beta;
  const auto m = static_cast<double>(G.m);
  const auto n = static_cast<double>(G.n);
  if (p.R.is_null()) {
    average(p.L, p.rho[0], multiplied(H, transposed(H), settings.precision), std::sqrt(n), beta,
            tau);
    p.rho[1] = p.rho[0];
  } else if (p.L.is_null()) {
    average(p.R, p.rho[0], multiplied(transposed(H), H, settings.precision), std::sqrt(m), beta,
            tau);
    p.rho[1] = p.rho[0];
  } else if (settings.options.integrator == Integrator::kKsl) {
    ksl(p, H, a, b, tau, settings.precision);
  } else if (settings.options.integrator == Integrator::kBug) {
    bug(p, H, a, b, tau, settings.precision);
  } else {
    diagonal(p, H, tau, settings.options, settings.precision);
  }
}

}  // namespace kernel_check::reference
