// What bounds an update, and below what a rotated number is rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "dykaf/rounding.h"
#include "dykaf/types.h"

namespace dykaf {

// C with exp_avg^2 <= C exp_avg_sq after `step` steps of Adam, whatever the gradients (Cauchy and
// Schwarz): (1 - beta1)^2 / (1 - beta2) times the sum of q^k for k < step, q = beta1^2 / beta2. It
// is at most 1 for equal betas. For q >= 1 the sum has no limit, and 1 is taken where it is larger.
DYKAF_HOST_DEVICE inline double momentum_bound(const Options& options, double step) {
  const double q = options.beta2 > 0 ? options.beta1 * options.beta1 / options.beta2 : 1.0;
  const double sum = q == 1 ? step : (std::pow(q, step) - 1) / (q - 1);
  const double bound = (1 - options.beta1) * (1 - options.beta1) / (1 - options.beta2) * sum;
  return q >= 1 && bound > 1 ? 1.0 : bound;
}

// What exp_avg^2 is multiplied by for the least that exp_avg_sq may be; 0 before the first step.
DYKAF_HOST_DEVICE inline double momentum_floor(const Options& options, double step) {
  return step > 0 ? 1 / momentum_bound(options, step) : 0.0;
}

// The largest magnitude of an entry of Adam's update in the basis, after bias correction: 1 for
// equal betas. With Nesterov's momentum the gradient, whose square is at most exp_avg_sq over
// 1 - beta2, has its part.
DYKAF_HOST_DEVICE inline double update_bound(const Options& options, double step) {
  const double left2 = 1 - std::pow(options.beta2, step);
  const double bound =
      std::sqrt(momentum_bound(options, step) * left2) / (1 - std::pow(options.beta1, step));
  if (!options.nesterov) return bound;
  return options.beta1 * bound + (1 - options.beta1) * std::sqrt(left2 / (1 - options.beta2));
}

// Entries of a rotated matrix below this multiple of its largest entry before the rotation are
// taken for zero: a dot product over a side errs by some units of rounding of its vectors' lengths,
// and a column or row is at most sqrt(side) times its largest entry long. `side` is the longest
// that is rotated.
template <typename T>
DYKAF_HOST_DEVICE double rounding_share(int64_t side) {
  constexpr double kUnits = 16;
  constexpr double kUnitRoundoff = 0.5 * static_cast<double>(std::numeric_limits<T>::epsilon());
  return kUnits * kUnitRoundoff * std::sqrt(static_cast<double>(side));
}

// Of a row's sum of squares, what a skinny basis misses is known to no better than this share: the
// difference of two sums, one of them through the basis's rounded entries.
template <typename T>
DYKAF_HOST_DEVICE double least_outside(const Options& options) {
  const double rounding = static_cast<double>(std::numeric_limits<T>::epsilon());
  return 4 * (options.basis_rounding > rounding ? options.basis_rounding : rounding);
}

// Adam's gradients are tau H with ||H|| <= sqrt(m n). Beyond this tau their squares would overflow,
// and an infinite second moment never falls again: larger gradients count as if they were smaller.
template <typename T>
DYKAF_HOST_DEVICE double largest_adam_tau(int64_t m, int64_t n) {
  constexpr int kExponent = std::numeric_limits<T>::max_exponent / 2 - 2;
  int exponent = 0;
  std::frexp(std::sqrt(static_cast<double>(m) * static_cast<double>(n)), &exponent);
  return std::ldexp(1.0, kExponent - exponent);
}

}  // namespace dykaf
