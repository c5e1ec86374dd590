// Tracked whitened updates: one pass over exp_avg, Newton-Schulz, one pass over the update.
#include <algorithm>
#include <cmath>

#include "cpu/linalg.h"
#include "cpu/loops.h"
#include "cpu/whitening.h"

namespace dykaf::cpu {
namespace {

template <typename T>
DYKAF_WIDE void multiply_row(const T* x, T row, const T* cols, int64_t n, T* out) {
  if (cols == nullptr) {
    for (int64_t j = 0; j < n; ++j) out[j] = row * x[j];
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = row * x[j] * cols[j];
  }
}

template <typename T>
struct Blend {
  T keep;         // of exp_avg
  T gain;         // of the newest
  T of_momentum;  // the average is of_momentum exp_avg + of_newest gain newest
  T of_newest;
};

// exp_avg takes in `newest`, which becomes the average to be orthogonalised.
template <typename T>
DYKAF_WIDE void blend_range_(T* exp_avg, T* newest, int64_t size, const Blend<T>& blend) {
  for (int64_t i = 0; i < size; ++i) {
    const T g = blend.gain * newest[i];
    exp_avg[i] = blend.keep * exp_avg[i] + g;
    newest[i] = blend.of_momentum * exp_avg[i] + blend.of_newest * g;
  }
}

template <typename T>
DYKAF_WIDE void drop_noise(const T* x, T noise, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = std::abs(x[i]) < noise ? T(0) : x[i];
}

}  // namespace

template <typename T>
double mean_eigenvalue(const T* factor, int64_t n) {
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += static_cast<double>(factor[i * (n + 1)]);
  return trace / static_cast<double>(n);
}

template <typename T>
std::vector<T> inverse_powers(const T* factor, int64_t n, double exponent) {
  if (factor == nullptr) return std::vector<T>(n, T(1));
  const double mean = mean_eigenvalue(factor, n);
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, static_cast<double>(factor[i * (n + 1)]));
  }
  const double least = largest * least_eigenvalue<T>(n);
  std::vector<T> powers(n);
  for (int64_t i = 0; i < n && mean > 0; ++i) {
    const double entry = std::max(static_cast<double>(factor[i * (n + 1)]), least);
    powers[i] = static_cast<T>(std::pow(entry / mean, -exponent));
  }
  return powers;
}

template <typename T>
void multiply_sides(const T* X, const T* rows, const T* cols, int64_t m, int64_t n, T* out) {
  at::parallel_for(0, m, std::max<int64_t>(1, kGrain / n), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      multiply_row(X + i * n, rows == nullptr ? T(1) : rows[i], cols, n, out + i * n);
    }
  });
}

template <typename T>
void whitened_update_(const Problem<T>& p, const Options& options, const T* H, T tau, T* update,
                      const Workspace<T>& workspace) {
  factor_update_(p, options, H, tau, workspace);
  const std::vector<T> rows = inverse_powers(p.L, p.m, options.exponent);
  const std::vector<T> cols = inverse_powers(p.R, p.n, options.exponent);
  const auto whiten = [&](T* X) { multiply_sides(X, rows.data(), cols.data(), p.m, p.n, X); };
  *p.step += 1;

  const bool left = p.L != nullptr;
  const double root = p.rho[0] * std::sqrt(mean_eigenvalue(left ? p.L : p.R, left ? p.m : p.n));
  // Where zero gradients have let rho vanish the quotient would overflow.
  const double gain =
      p.grad_max > 0 ? (1 - options.beta1) * (static_cast<double>(tau) / root) : 0.0;
  const double correction = 1 - std::pow(options.beta1, static_cast<double>(*p.step));
  const Blend<T> blend = {
      .keep = static_cast<T>(options.beta1),
      .gain = static_cast<T>(gain),
      .of_momentum = static_cast<T>(options.nesterov ? options.beta1 / correction : 1.0),
      .of_newest = static_cast<T>(options.nesterov ? 1.0 : 0.0)};
  const double largest = p.grad_max * std::abs(options.grad_scale) / static_cast<double>(tau);
  const T noise = static_cast<T>(largest * rounding_share<T>(p.rotated_side()));
  for_chunks(p.size(), [&](int64_t, int64_t begin, int64_t end) {
    drop_noise(H + begin, noise, end - begin, update + begin);
  });
  if (options.momentum == Momentum::kWhitened) whiten(update);
  for_chunks(p.size(), [&](int64_t, int64_t begin, int64_t end) {
    blend_range_(p.exp_avg + begin, update + begin, end - begin, blend);
  });
  if (options.momentum == Momentum::kPlain) whiten(update);

  orthogonalize_(p, options, update, workspace);
  const double length = frobenius_norm(update, p.size());
  whiten(update);
  double scale = 1;
  const double whitened_length = frobenius_norm(update, p.size());
  if (options.graft && whitened_length > 0) {
    scale = length / whitened_length;
    combine_(update, update, 0.0, scale, p.size());
  }
  *p.update_rms =
      static_cast<float>(scale * whitened_length / std::sqrt(static_cast<double>(p.size())));
}

template double mean_eigenvalue(const float*, int64_t);
template double mean_eigenvalue(const double*, int64_t);
template std::vector<float> inverse_powers(const float*, int64_t, double);
template std::vector<double> inverse_powers(const double*, int64_t, double);
template void multiply_sides(const float*, const float*, const float*, int64_t, int64_t, float*);
template void multiply_sides(const double*, const double*, const double*, int64_t, int64_t,
                             double*);
template void whitened_update_(const Problem<float>&, const Options&, const float*, float, float*,
                               const Workspace<float>&);
template void whitened_update_(const Problem<double>&, const Options&, const double*, double,
                               double*, const Workspace<double>&);

}  // namespace dykaf::cpu
