// The numbers that one matrix's step hangs on, computed on the device once per step.
#pragma once

#include <cstdint>

namespace dykaf::cuda {

struct MatrixScalars {
  int32_t active;         // 0: the step leaves this matrix as it is
  int32_t zero_gradient;  // only rho decays
  int32_t stopped;        // a norm vanished: the factors and rho keep their values

  float tau;         // H = gradient / tau, a power of two
  float load_scale;  // grad_scale / tau

  // Adam
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float correction1;  // of exp_avg
  float correction2;  // of the root of exp_avg_sq
  float eps;
  float adam_tau;       // the gradient is adam_tau H
  float noise;          // |H| below it is rounding
  float update_bound;   // of the update's entries, after bias correction
  float least_outside;  // share of a row's squares that a skinny basis may miss by rounding

  // Parameter
  float keep;  // 1 - lr weight_decay
  float lr;
  uint64_t rounding_key;

  // Factors: factor <- keep factor + gain increment, per Side; c: the integrator's S-step
  double c;
  float keep_factor[2];
  float gain[2];
};

}  // namespace dykaf::cuda
