// Kernels with one fault each, and what the executor must say about it.
#pragma once

#include <cstdint>

namespace {

using namespace dykaf::cuda;

__global__ void divergent_barrier(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void exit_before_barrier(float*) {
  if (threadIdx.x == 0) {
    return;
  }
  __syncthreads();
}

__global__ void exit_before_shuffle(float* out) {
  if (threadIdx.x % 32 == 7) {
    return;
  }
  out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);
}

__global__ void barrier_against_shuffle(float*) {
  if (threadIdx.x < 16) {
    __syncwarp();
  }
  __syncthreads();
}

__global__ void caller_outside_of_mask(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000FFFFu, 1.0f, 1);
}

__global__ void overlapping_masks(float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0001FFFFu : 0xFFFF0000u;
  out[threadIdx.x] = __shfl_xor_sync(mask, 1.0f, 1);
}

__global__ void different_collectives(float* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);
  } else {
    out[threadIdx.x] = __shfl_down_sync(0xFFFFFFFFu, 1.0f, 1);
  }
}

__global__ void shuffle_from_outside_of_mask(float* out) {
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __shfl_xor_sync(0x0000FFFFu, 1.0f, 16);
  }
}

__global__ void undersized_dynamic_shared(float* out) {
  DYKAF_DYNAMIC_SHARED(base);
  SharedCarver carver(base);
  carver.take<float>(200);
  out[threadIdx.x] = carver.take<float>(64)[0];
}

__global__ void lanes_carve_differently(float*) {
  DYKAF_DYNAMIC_SHARED(base);
  SharedCarver carver(base);
  carver.take<float>(threadIdx.x == 33 ? 8 : 4);
}

__global__ void carve_past_the_base(float*) {
  DYKAF_DYNAMIC_SHARED(base);
  SharedCarver carver(base + 16);
}

__global__ void oversized_static_shared(float*) {
  DYKAF_SHARED(float, first, [8 * 1024]);
  DYKAF_SHARED(float, second, [8 * 1024]);
  first[threadIdx.x] = second[threadIdx.x] = 0.0f;
}

__global__ void misaligned_load(float* out) { out[threadIdx.x] = load_global4(out + 65).x; }

__global__ void misaligned_store(float* out) { store_global4(out + 2, make_float4(0, 0, 0, 0)); }

__global__ void misaligned_bytes(float* out) {
  store_global_16bytes(out + 1, load_global_16bytes(out));
}

__global__ void misaligned_shared_pair(float* out) {
  DYKAF_SHARED(float, tile, [256]);
  out[threadIdx.x] = load_shared2(tile + 2 * threadIdx.x + 1).x;
}

__global__ void misaligned_copy(float* out) {
  DYKAF_SHARED(float, tile, [256]);
  cp_async16(tile + 4 * threadIdx.x + 1, out, 16);
}

__global__ void misaligned_copy_source(float* out) {
  DYKAF_SHARED(float, tile, [256]);
  cp_async16(tile + 4 * threadIdx.x, out + 1, 16);
}

__global__ void copy_of_too_many_bytes(float* out) {
  DYKAF_SHARED(float, tile, [256]);
  cp_async16(tile + 4 * threadIdx.x, out, 20);
}

__global__ void exit_with_copy_in_flight(float* out) {
  DYKAF_SHARED(float, tile, [256]);
  cp_async16(tile + 4 * threadIdx.x, out, 16);
  cp_async_commit();
}

__global__ void misaligned_ldmatrix(float*) {
  DYKAF_SHARED(float, tile, [256]);
  uint32_t fragment[4];
  ldmatrix_x4(fragment, tile + 4 * (threadIdx.x % 32) + 2);
}

struct Fault {
  const char* name;
  void (*kernel)(float*);
  const char* message;
  const char* other_message = nullptr;  // where it depends on the order of the lanes
};

constexpr Fault kFaults[] = {
    {"divergent barrier", divergent_barrier, "different __syncthreads"},
    {"early exit before a barrier", exit_before_barrier, "lane exited while others wait",
     "barrier after a lane has exited"},
    {"early exit before a shuffle", exit_before_shuffle, "deadlock"},
    {"barrier against __syncwarp", barrier_against_shuffle, "deadlock"},
    {"calling lane outside of its mask", caller_outside_of_mask, "not in the mask"},
    {"overlapping masks", overlapping_masks, "overlapping masks", "deadlock"},
    {"different collectives in one warp", different_collectives, "divergent warp collective"},
    {"shuffle from outside of the mask", shuffle_from_outside_of_mask, "outside of the mask"},
    {"undersized dynamic shared memory", undersized_dynamic_shared, "carved 1056 bytes of 1024"},
    {"lanes carve differently", lanes_carve_differently, "carve dynamic shared memory differently"},
    {"carving past the base", carve_past_the_base, "start at the base"},
    {"oversized static shared memory", oversized_static_shared, "static shared memory exhausted"},
    {"misaligned load_global4", misaligned_load, "misaligned access"},
    {"misaligned store_global4", misaligned_store, "misaligned access"},
    {"misaligned store_global_16bytes", misaligned_bytes, "misaligned access"},
    {"misaligned load_shared2", misaligned_shared_pair, "misaligned access"},
    {"misaligned cp.async destination", misaligned_copy, "misaligned shared address"},
    {"misaligned cp.async source", misaligned_copy_source, "misaligned global address"},
    {"cp.async of too many bytes", copy_of_too_many_bytes, "bad source size"},
    {"exit with cp.async in flight", exit_with_copy_in_flight, "exit with cp.async in flight"},
    {"misaligned ldmatrix", misaligned_ldmatrix, "misaligned row address"},
};

// Faults that a sanitizer reports: each runs in a process of its own, which must not end well.

__global__ void static_shared_out_of_range(float* out) {
  DYKAF_SHARED(float, first, [64]);
  DYKAF_SHARED(float, second, [64]);
  second[threadIdx.x] = 0.0f;
  float* element = first;
  element[threadIdx.x + 1] = 1.0f;
  out[threadIdx.x] = second[threadIdx.x];
}

__global__ void dynamic_shared_out_of_range(float* out) {
  DYKAF_DYNAMIC_SHARED(base);
  SharedCarver carver(base);
  auto* first = carver.take<float>(64);
  auto* second = carver.take<float>(64);
  second[threadIdx.x] = 0.0f;
  first[threadIdx.x + 1] = 1.0f;
  out[threadIdx.x] = second[threadIdx.x];
}

__global__ void dynamic_shared_out_of_range_at_the_end(float* out) {
  DYKAF_DYNAMIC_SHARED(base);
  reinterpret_cast<float*>(base)[threadIdx.x + 193] = 1.0f;
  out[threadIdx.x] = 0.0f;
}

__global__ void global_out_of_range(float* out) { store_global4(out + 4 * threadIdx.x, {}); }

__global__ void copy_source_out_of_range(float* out) {
  DYKAF_SHARED(float, tile, [256]);
  cp_async16(tile + 4 * threadIdx.x, out + 4 * threadIdx.x, 16);
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void touched_while_in_flight(float* out) {
  DYKAF_SHARED(float, tile, [256]);
  cp_async16(tile + 4 * threadIdx.x, out, 16);
  cp_async_commit();
  out[threadIdx.x] = tile[4 * threadIdx.x];
  cp_async_wait<0>();
}

__global__ void race_without_barrier(float* out) {
  DYKAF_SHARED(float, tile, [64]);
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void race_within_a_warp(float* out) {
  DYKAF_SHARED(float, tile, [64]);
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);  // orders nothing
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void race_with_ldmatrix(float* out) {
  DYKAF_SHARED(float, tile, [512]);
  for (int i = 0; i < 8; ++i) {
    tile[threadIdx.x + 64 * i] = 1.0f;
  }
  uint32_t fragment[4];
  ldmatrix_x4(fragment, tile + 4 * threadIdx.x);
  out[threadIdx.x] = __uint_as_float(fragment[0]);
}

// Every block writes a partial sum, the last one to finish adds them.
template <bool kHasFence>
__global__ void last_block_adds(float* out, float* partials, unsigned* num_done) {
  if (threadIdx.x != 0) {
    return;
  }
  partials[blockIdx.x] = 1.0f;
  if (kHasFence) {
    __threadfence();
  }
  if (atomicAdd(num_done, 1u) + 1 == gridDim.x) {
    if (kHasFence) {
      __threadfence();
    }
    float sum = 0.0f;
    for (unsigned i = 0; i < gridDim.x; ++i) {
      sum += partials[i];
    }
    *out = sum;
  }
}

struct SanitizerFault {
  const char* name;
  void (*kernel)(float*);
};

constexpr SanitizerFault kAddressFaults[] = {
    {"static shared memory out of range", static_shared_out_of_range},
    {"dynamic shared memory out of range", dynamic_shared_out_of_range},
    {"dynamic shared memory past its end", dynamic_shared_out_of_range_at_the_end},
    {"global memory out of range", global_out_of_range},
    {"cp.async source out of range", copy_source_out_of_range},
    {"cp.async destination touched in flight", touched_while_in_flight},
};

constexpr SanitizerFault kRaces[] = {
    {"missing barrier", race_without_barrier},
    {"missing __syncwarp", race_within_a_warp},
    {"missing barrier before ldmatrix", race_with_ldmatrix},
};

}  // namespace
