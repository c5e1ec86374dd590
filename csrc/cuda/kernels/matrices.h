// What every grouped kernel reads: the matrices of a launch, their scalars, the work on them.
// Launchers take arrays on the device and return a cudaError_t.
#pragma once

#include <cstdint>

#include "dykaf/cuda_ops.h"

namespace dykaf::cuda {

// What kernels read and write of a matrix: dykaf::Problem has the meaning of each array. All
// pointers are to the device, and null where the matrix has no such array.
struct MatrixOnDevice {
  int64_t m;
  int64_t n;
  int64_t rotated_side;   // the longest side whose basis gradients are rotated to, 0 without one
  int64_t skinny_rank;    // 0: not skinny
  Rate rate;              // of the parameter
  uint64_t stream;        // names its random numbers
  Place place;            // of a shard's elements in its matrix, for the same numbers
  DType dtype;            // of grad and param
  bool has_two_averages;  // of either side, each with a rho of its own

  const void* grad;          // [m, n] in dtype
  void* param;               // [m, n] in dtype
  float* master;             // [m, n]
  float* exp_avg;            // [m, n]
  float* exp_avg_sq;         // [m, n]; skinny: [s, skinny_rank + 1]
  float* exp_avg_sq_row;     // [m]
  float* exp_avg_sq_col;     // [n]
  double* exp_avg_sq_scale;  // [1]
  double* rho;               // [2]
  float* basis;              // [2 skinny_rank, l]
  float* core;               // [2 skinny_rank, 2 skinny_rank]
  float* flat;               // [1]
  float* step;               // [1]
  float* update_rms;         // [1]

  // constexpr is what lets kernels call them.
  constexpr bool is_wide() const { return m < n; }
  constexpr int64_t short_side() const { return is_wide() ? m : n; }
  constexpr int64_t long_side() const { return is_wide() ? n : m; }
};

// The numbers that one matrix's step hangs on, computed on the device once per step.
struct MatrixScalars {
  int32_t active;         // 0: the step leaves this matrix as it is
  int32_t zero_gradient;  // only rho decays
  int32_t stopped;        // a norm vanished: the factors and rho keep their values

  float tau;         // H = gradient / tau, a power of two
  float load_scale;  // grad_scale / tau

  // Adam
  float of_momentum;   // the update's numerator is of_momentum exp_avg + of_gradient g:
  float of_gradient;   // exp_avg after bias correction, or Nesterov's mean of that and g
  float correction2;   // of the root of exp_avg_sq
  float adam_tau;      // the gradient is adam_tau H
  float noise;         // |H| below it is rounding
  float update_bound;  // of the update's entries, after bias correction

  // Parameter; lr may be known to the device alone
  float keep;  // 1 - lr weight_decay
  float lr;
  uint64_t rounding_key;

  // Factors: factor <- keep factor + gain increment, per Side; c: the integrator's S-step
  double c;
  float keep_factor[2];
  float gain[2];
};

// The options of Adam as the elements meet them, the same for all matrices of a group.
struct AdamOptions {
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float least_outside;  // share of a row's squares that a skinny basis may miss by rounding
  float full_rms;       // an orthogonal update of a smaller direction fades; 0: none does
};

// The matrices of a launch and their scalars, on the device. The options are arguments of the
// kernels of elements, where they take no registers; gemm takes fewer with those in the image.
struct Group {
  const MatrixOnDevice* matrices;  // [num]
  MatrixScalars* scalars;          // [num]
  int32_t num;
  AdamOptions adam;
};

// A grouped launch over `problems`, with `grid` blocks.
template <typename GroupedProblem>
struct Grouped {
  const GroupedProblem* problems;
  int32_t num;
  int64_t grid;
};

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dykaf::cuda
