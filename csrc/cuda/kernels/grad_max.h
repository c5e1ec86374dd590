// max|gradient| of many gradients.
#pragma once

#include "cuda/kernels/matrices.h"

namespace dykaf::cuda {

// In two stages: over blocks, then over each gradient's blocks.
struct GradMaxProblem {
  Gradient gradient;
  float* partials;  // [num_tiles], NaN where an entry is not finite
  double* maximum;  // [1]
  int32_t num_tiles;
  int32_t tile_begin;
};
int64_t grad_max_tiles(int64_t size);
int launch_grad_max(const Grouped<GradMaxProblem>& launch, Stream stream);
int launch_grad_max_finish(const Grouped<GradMaxProblem>& launch, Stream stream);

}  // namespace dykaf::cuda
