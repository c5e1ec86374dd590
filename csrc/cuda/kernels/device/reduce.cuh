// Sums over a block in a fixed order: the same bits for any schedule.
#pragma once

#include "cuda/kernels/device/platform.cuh"

namespace dykaf::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

// The sum over the warp, known to every lane.
DYKAF_DEVICE double warp_sum(double x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kFullMask, x, offset);
  }
  return x;
}

// The sums over the block of kNum numbers per thread, known to every thread afterwards. `scratch`
// is shared, [kNum * number of warps]; it is free for use again when this returns.
template <int kNum>
DYKAF_DEVICE void block_sum(double (&values)[kNum], double* scratch, int num_threads) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
  for (int i = 0; i < kNum; ++i) {
    values[i] = warp_sum(values[i]);
    if (lane == 0) scratch[warp * kNum + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kNum; ++i) {
    values[i] = 0;
    for (int w = 0; w < num_threads / kWarpSize; ++w) values[i] += scratch[w * kNum + i];
  }
  __syncthreads();
}

}  // namespace dykaf::cuda
