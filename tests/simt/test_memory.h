// What kernels find in shared memory, when asynchronous copies land, and bank conflicts.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "test_check.h"

namespace {

using namespace dykaf::cuda;

constexpr int kThreads = 64;
constexpr size_t kDynamicBytes = 1024;

__global__ void stale_memory_kernel(float* in_flight, float* landed, float* uninitialized,
                                    float* carved_again, float* kept, const float* in) {
  DYKAF_SHARED(float, tile, [kThreads]);
  DYKAF_SHARED(float, never_written, [kThreads]);
  DYKAF_DYNAMIC_SHARED(base);
  const int i = threadIdx.x;
  cp_async4(&tile[i], &in[i], i % 2 == 0 ? 4 : 0);
  cp_async_commit();
  in_flight[i] = tile[i];
  cp_async_wait<0>();
  landed[i] = tile[i];
  uninitialized[i] = never_written[i];
  never_written[i] = 1.0f;

  SharedCarver first(base);
  first.take<float>(kThreads)[i] = in[i];
  first.take<float>(kThreads)[i] = in[i];
  __syncthreads();
  SharedCarver second(base, kReuse);
  kept[i] = second.take<float>(kThreads)[i];
  carved_again[i] = second.take<float>(kThreads / 2)[i / 2];
}

void test_stale_memory() {
  std::vector<float> in(kThreads, 5.0f);
  std::vector<float> out(5 * kThreads);
  float* in_flight = out.data();
  float* landed = in_flight + kThreads;
  float* uninitialized = landed + kThreads;
  float* carved_again = uninitialized + kThreads;
  float* kept = carved_again + kThreads;
  simt::options().workers = 1;
  DYKAF_LAUNCH(stale_memory_kernel, 2, kThreads, kDynamicBytes, nullptr, in_flight, landed,
               uninitialized, carved_again, kept, in.data());
  simt::options().workers = 0;
  bool is_nan_in_flight = true;
  bool is_landed = true;
  bool is_nan_uninitialized = true;
  bool is_nan_carved_again = true;
  bool is_kept = true;
  for (int i = 0; i < kThreads; ++i) {
    is_nan_in_flight &= std::isnan(in_flight[i]);
    is_landed &= landed[i] == (i % 2 == 0 ? 5.0f : 0.0f);
    is_nan_uninitialized &= std::isnan(uninitialized[i]);
    is_nan_carved_again &= std::isnan(carved_again[i]);
    is_kept &= kept[i] == 5.0f;
  }
  check("cp.async is NaN before its wait", is_nan_in_flight);
  check("cp.async lands at its wait, zero-filled", is_landed);
  check("shared memory is NaN in each block", is_nan_uninitialized);
  check("memory carved differently is NaN again", is_nan_carved_again);
  check("memory carved alike is kept", is_kept);
}

// The newest group may still be in flight after cp_async_wait<1>.
__global__ void pipeline_kernel(float* out, const float* in) {
  DYKAF_SHARED(float, tile, [2][kThreads]);
  const int i = threadIdx.x;
  cp_async4(&tile[0][i], &in[i], 4);
  cp_async_commit();
  cp_async4(&tile[1][i], &in[i], 4);
  cp_async_commit();
  cp_async_wait<1>();
  out[i] = tile[0][i];
  out[kThreads + i] = tile[1][i];
  cp_async_wait<0>();
}

void test_pipeline() {
  std::vector<float> in(kThreads, 5.0f);
  std::vector<float> out(2 * kThreads);
  simt::reset();
  DYKAF_LAUNCH(pipeline_kernel, 1, kThreads, 0, nullptr, out.data(), in.data());
  bool is_right = simt::stats().cp_async == 2 * kThreads;
  for (int i = 0; i < kThreads; ++i) {
    is_right &= out[i] == 5.0f && std::isnan(out[kThreads + i]);
  }
  check("cp_async_wait<1> leaves the newest group in flight", is_right);
}

enum class Access { kWord, kPair, kHalfOfTheWarp };

__global__ void bank_kernel(float* out, int stride, Access access) {
  DYKAF_SHARED(float, tile, [32 * 33]);
  const int i = threadIdx.x;
  tile[i] = 0.0f;
  __syncthreads();
  if (access == Access::kPair) {
    out[i] = load_shared2(&tile[i * stride]).x;
  } else if (access == Access::kWord || i % 2 == 0) {
    out[i] = load_shared(&tile[i * stride]);
  }
  __syncthreads();
}

void test_banks() {
  const auto expect = [](const char* name, int stride, Access access, uint64_t num_conflicts) {
    float out[32];
    simt::reset();
    simt::options().check_banks = true;
    DYKAF_LAUNCH(bank_kernel, 1, 32, 0, nullptr, out, stride, access);
    simt::options().check_banks = false;
    const uint64_t found = simt::stats().shared_load_conflicts;
    check(name, simt::stats().shared_loads == 1 && found == num_conflicts,
          std::to_string(found) + " conflicts");
  };
  expect("banks: broadcast", 0, Access::kWord, 0);
  expect("banks: stride 1", 1, Access::kWord, 0);
  expect("banks: stride 2", 2, Access::kWord, 1);
  expect("banks: stride 32", 32, Access::kWord, 31);
  expect("banks: stride 33", 33, Access::kWord, 0);
  expect("banks: pairs, stride 2", 2, Access::kPair, 0);
  expect("banks: pairs, stride 4", 4, Access::kPair, 2);
  expect("banks: half of the warp, stride 1", 1, Access::kHalfOfTheWarp, 0);
  expect("banks: half of the warp, stride 32", 32, Access::kHalfOfTheWarp, 15);
}

}  // namespace
