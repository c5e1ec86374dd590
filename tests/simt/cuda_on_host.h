// Compiles CUDA kernels for the CPU and runs them under the SIMT executor of this folder.
// Force-included before everything else: g++ -x c++ -std=c++20 -include tests/simt/cuda_on_host.h
#pragma once

#ifdef __CUDACC__
#error "cuda_on_host.h is for a host compiler; nvcc has the real CUDA"
#endif

#define DYKAF_SIMT 1

#include "collectives.h"
#include "cp_async.h"
#include "intrinsics.h"
#include "launch.h"
#include "memory_access.h"
#include "runtime_api.h"
#include "shared_memory.h"
#include "tensor_core.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __align__(n) alignas(n)

// A variable in static shared memory: DYKAF_SHARED(float, partials, [32]).
#define DYKAF_SHARED(type, name, dims) \
  static const char name##_key = 0;    \
  using name##_type = type dims;       \
  name##_type& name =                  \
      *reinterpret_cast<name##_type*>(::simt::static_shared(&name##_key, sizeof(name##_type)))

// The base of dynamic shared memory, to be divided by a SharedCarver.
#define DYKAF_DYNAMIC_SHARED(name) unsigned char* name = ::simt::dynamic_shared()

// Runs the kernel to its end. Throws std::runtime_error if the executor finds a fault.
#define DYKAF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::simt::launch(#kernel, kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)
