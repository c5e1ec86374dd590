// Adam on a range of elements (Kingma & Ba 2015; bias correction and eps as in torch.optim.AdamW).
#pragma once

#include <cmath>

#include "cpu/loops.h"
#include "dykaf/bounds.h"
#include "dykaf/types.h"

namespace dykaf::cpu {

template <typename T>
struct AdamScalars {
  // Of a matrix whose rotated gradient is tau h; tau = 1 for what is not rotated.
  AdamScalars(const Problem<T>& p, const Options& options, T tau)
      : AdamScalars(options, static_cast<double>(*p.step)) {
    this->tau = std::min(tau, static_cast<T>(largest_adam_tau<T>(p.m, p.n)));
    const double largest = p.grad_max * std::abs(options.grad_scale) / static_cast<double>(tau);
    noise = static_cast<T>(largest * rounding_share<T>(p.rotated_side()));
    if (options.nesterov && !p.is_adamw()) {
      of_momentum *= beta1;
      of_gradient = one_minus_beta1;
    }
  }

  AdamScalars(const Options& options, double step)
      : beta1(static_cast<T>(options.beta1)),
        one_minus_beta1(static_cast<T>(1 - options.beta1)),
        beta2(static_cast<T>(options.beta2)),
        one_minus_beta2(static_cast<T>(1 - options.beta2)),
        of_momentum(static_cast<T>(1 / (1 - std::pow(options.beta1, step)))),
        correction2(static_cast<T>(1 / std::sqrt(1 - std::pow(options.beta2, step)))),
        eps(static_cast<T>(options.eps)),
        bound(static_cast<T>(update_bound(options, step))) {}

  T beta1;
  T one_minus_beta1;
  T beta2;
  T one_minus_beta2;
  T of_momentum;      // the update's numerator is of_momentum exp_avg + of_gradient g:
  T of_gradient = 0;  // exp_avg after bias correction, or Nesterov's mean of that and g
  T correction2;      // of the root of exp_avg_sq
  T eps;
  T bound;      // of the update's entries
  T tau = 1;    // the gradient is tau h
  T noise = 0;  // |h| below it is rounding
};

template <typename T>
T gradient_of(T h, const AdamScalars<T>& s) {
  return std::abs(h) < s.noise ? T(0) : s.tau * h;
}

template <typename T>
T blend_momentum(T exp_avg, T g, const AdamScalars<T>& s) {
  return s.beta1 * exp_avg + s.one_minus_beta1 * g;
}

// update = exp_avg / (sqrt(exp_avg_sq) + eps), both bias-corrected.
// update may alias h.
template <typename T>
DYKAF_WIDE void adam_range_(T* exp_avg, T* exp_avg_sq, const T* h, T* update, int64_t size,
                            const AdamScalars<T>& s) {
  for (int64_t i = 0; i < size; ++i) {
    const T g = gradient_of(h[i], s);
    exp_avg[i] = blend_momentum(exp_avg[i], g, s);
    exp_avg_sq[i] = s.beta2 * exp_avg_sq[i] + s.one_minus_beta2 * g * g;
    const T denominator = std::sqrt(exp_avg_sq[i]) * s.correction2 + s.eps;
    update[i] = (exp_avg[i] * s.of_momentum + g * s.of_gradient) / denominator;
  }
}

}  // namespace dykaf::cpu
