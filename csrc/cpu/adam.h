// Adam on a range of elements (Kingma & Ba 2015; bias correction and eps as in torch.optim.AdamW).
#pragma once

#include <cmath>

#include "cpu/loops.h"
#include "dykaf/types.h"

namespace dykaf::cpu {

template <typename T>
struct AdamScalars {
  AdamScalars(const Options& options, double step)
      : beta1(static_cast<T>(options.beta1)),
        one_minus_beta1(static_cast<T>(1 - options.beta1)),
        beta2(static_cast<T>(options.beta2)),
        one_minus_beta2(static_cast<T>(1 - options.beta2)),
        correction1(static_cast<T>(1 / (1 - std::pow(options.beta1, step)))),
        correction2(static_cast<T>(1 / std::sqrt(1 - std::pow(options.beta2, step)))),
        eps(static_cast<T>(options.eps)) {}

  T beta1;
  T one_minus_beta1;
  T beta2;
  T one_minus_beta2;
  T correction1;  // of exp_avg
  T correction2;  // of the root of exp_avg_sq
  T eps;
};

template <typename T>
T blend_momentum(T exp_avg, T g, const AdamScalars<T>& s) {
  return s.beta1 * exp_avg + s.one_minus_beta1 * g;
}

// update = exp_avg / (sqrt(exp_avg_sq) + eps), both bias-corrected; gradient tau h.
// update may alias h.
template <typename T>
DYKAF_WIDE void adam_range_(T* exp_avg, T* exp_avg_sq, const T* h, T tau, T* update, int64_t size,
                            const AdamScalars<T>& s) {
  for (int64_t i = 0; i < size; ++i) {
    const T g = tau * h[i];
    exp_avg[i] = blend_momentum(exp_avg[i], g, s);
    exp_avg_sq[i] = s.beta2 * exp_avg_sq[i] + s.one_minus_beta2 * g * g;
    const T denominator = std::sqrt(exp_avg_sq[i]) * s.correction2 + s.eps;
    update[i] = exp_avg[i] * s.correction1 / denominator;
  }
}

}  // namespace dykaf::cpu
