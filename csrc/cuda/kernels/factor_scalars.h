// The numbers that the factor update hangs on.
#pragma once

#include "cuda/kernels/matrices.h"

namespace dykaf::cuda {

// The coefficients of the factors' new values, and rho, from inner products; one block
// per matrix.
enum class FactorStage : int32_t { kKslLeft, kKslRight, kBug, kAverageLeft, kAverageRight };
struct FactorProblem {
  const double* left;      // [left_tiles, 3]: <L,L>, <L,A>, <A,A>, A the increment of L
  const double* right;     // the same of R
  const double* coupling;  // [coupling_tiles, 3], the second counts: <A H, H B>
  int32_t left_tiles;
  int32_t right_tiles;
  int32_t coupling_tiles;
  int32_t matrix_idx;
  double size;  // average: increments are divided by it
  FactorStage stage;
};
int launch_factor_scalars(const Grouped<FactorProblem>& launch, const Group& group,
                          double factor_beta, Stream stream);

}  // namespace dykaf::cuda
