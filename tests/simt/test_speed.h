// Costs of the executor: of a barrier and a shuffle for each lane, and of a block.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

__global__ void nothing_kernel() {}

__global__ void barrier_kernel(int count) {
  for (int i = 0; i < count; ++i) {
    __syncthreads();
  }
}

__global__ void repeated_shuffle_kernel(int count, float* out) {
  float value = static_cast<float>(threadIdx.x);
  for (int i = 0; i < count; ++i) {
    value = __shfl_xor_sync(0xFFFFFFFFu, value, 1 + i % 16);
  }
  out[threadIdx.x] = value;
}

template <typename Launch>
double fastest_seconds(Launch&& launch) {
  constexpr int kRepeats = 5;
  double fastest = INFINITY;
  for (int i = 0; i < kRepeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    launch();
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    fastest = std::min(fastest, time.count());
  }
  return fastest;
}

void measure_speed() {
  constexpr int kLaneOperations = 2000000;
  simt::options().workers = 1;
  std::vector<float> out(1024);
  for (const uint64_t seed : {0, 5}) {
    simt::options().seed = seed;
    for (const int threads : {32, 256, 1024}) {
      const int count = kLaneOperations / threads;
      const double barriers =
          fastest_seconds([&] { DYKAF_LAUNCH(barrier_kernel, 1, threads, 0, nullptr, count); });
      const double shuffles = fastest_seconds([&] {
        DYKAF_LAUNCH(repeated_shuffle_kernel, 1, threads, 0, nullptr, count, out.data());
      });
      const double to_ns = 1e9 / threads / count;
      printf("seed %d, block of %4d: barrier %5.1f ns, shuffle %5.1f ns a lane\n",
             static_cast<int>(seed), threads, barriers * to_ns, shuffles * to_ns);
    }
  }
  constexpr int kBlocks = 20000;
  const double blocks =
      fastest_seconds([&] { DYKAF_LAUNCH(nothing_kernel, kBlocks, 256, 0, nullptr); });
  printf("empty block of 256: %.2f us\n", blocks * 1e6 / kBlocks);
}

}  // namespace
