// max|G| of each gradient, NaN where an entry is not finite.
#include "cuda/kernels/device/lookup.cuh"
#include "cuda/kernels/device/reduce.cuh"
#include "cuda/kernels/device/vector.cuh"
#include "cuda/kernels/grad_max.h"

namespace dykaf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 4;
constexpr int64_t kElementsPerBlock = int64_t{kThreads} * kUnitsPerThread * kUnit;

// The largest of all threads' values; NaN wins. `scratch` is shared, one per warp.
__device__ float block_max(float value, float* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const auto larger = [](float a, float b) { return a > b || a != a ? a : b; };
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = larger(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  for (int w = 0; w < kThreads / kWarpSize; ++w) value = larger(scratch[w], value);
  return value;
}

// Comparisons drop NaN, but NaN and infinity alone have x - x != 0.
__device__ float magnitude(float x) { return x - x == 0.0f ? fabsf(x) : nanf(""); }

// One block per kElementsPerBlock elements, in the order of the gradients.
__global__ void __launch_bounds__(kThreads)
    grad_max_kernel(const __grid_constant__ Grouped<GradMaxProblem> launch) {
  DYKAF_SHARED(float, scratch, [kThreads / kWarpSize]);
  const int block = static_cast<int>(blockIdx.x);
  const GradMaxProblem p = launch.problems[find_problem(launch.problems, launch.num, block)];
  const Gradient gradient = p.gradient;
  const int64_t begin = (block - p.tile_begin) * kElementsPerBlock;
  const int64_t end = min(gradient.size, begin + kElementsPerBlock);
  const bool aligned = is_aligned(gradient.data, 0, 0);
  float largest = 0.0f;
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * kUnit; i < end;
       i += int64_t{kThreads} * kUnit) {
    float x[kUnit];
    load_unit(gradient.data, gradient.dtype, i, static_cast<int>(min(int64_t{kUnit}, end - i)),
              aligned, x);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      const float value = magnitude(x[j]);
      largest = value > largest || value != value ? value : largest;
    }
  }
  largest = block_max(largest, scratch);
  if (threadIdx.x == 0) p.partials[block - p.tile_begin] = largest;
}

// One block per gradient.
__global__ void __launch_bounds__(kThreads)
    grad_max_finish_kernel(const __grid_constant__ Grouped<GradMaxProblem> launch) {
  DYKAF_SHARED(float, scratch, [kThreads / kWarpSize]);
  const GradMaxProblem p = launch.problems[blockIdx.x];
  float largest = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < p.num_tiles; i += kThreads) {
    const float value = p.partials[i];
    largest = value > largest || value != value ? value : largest;
  }
  largest = block_max(largest, scratch);
  if (threadIdx.x == 0) *p.maximum = static_cast<double>(largest);
}

}  // namespace

int64_t grad_max_tiles(int64_t size) { return ceil_div(size, kElementsPerBlock); }

int launch_grad_max(const Grouped<GradMaxProblem>& launch, Stream stream) {
  return DYKAF_LAUNCH(grad_max_kernel, dim3(static_cast<unsigned>(launch.grid)), dim3(kThreads), 0,
                      static_cast<cudaStream_t>(stream), launch);
}

int launch_grad_max_finish(const Grouped<GradMaxProblem>& launch, Stream stream) {
  return DYKAF_LAUNCH(grad_max_finish_kernel, dim3(static_cast<unsigned>(launch.num)),
                      dim3(kThreads), 0, static_cast<cudaStream_t>(stream), launch);
}

}  // namespace dykaf::cuda
