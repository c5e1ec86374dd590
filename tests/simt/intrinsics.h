// CUDA's device functions. Left out on purpose: atomicAdd on floating point, whose result depends
// on the order of the lanes, and __shared__, which could not be guarded (DYKAF_SHARED is).
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "collectives.h"

inline void __syncthreads(simt::Location where = simt::Location::current()) {
  simt::sync_block(where);
}

inline void __syncwarp(unsigned mask = simt::kFullMask,
                       simt::Location where = simt::Location::current()) {
  simt::meet("__syncwarp", mask, nullptr, nullptr, simt::MemoryOrder::kSequenced, where);
}

namespace simt {

template <typename T>
struct ShuffleOperands {
  T value;
  T result;
  int source_lane;
};

template <typename T>
SIMT_UNCHECKED void finish_shuffle(Worker&, Fiber* warp, uint32_t mask) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) {
      continue;
    }
    auto& operands = *static_cast<ShuffleOperands<T>*>(warp[lane].operands);
    if ((mask >> operands.source_lane & 1) == 0) {
      fail("shuffle reads a lane outside of the mask:", &warp[lane]);
    }
    const auto* source = static_cast<ShuffleOperands<T>*>(warp[operands.source_lane].operands);
    operands.result = source->value;
  }
}

template <typename T>
T shuffle(const char* operation, unsigned mask, T value, int source_lane, Location where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4);
  ShuffleOperands<T> operands{value, value, source_lane};
  meet(operation, mask, &operands, finish_shuffle<T>, MemoryOrder::kNone, where);
  return operands.result;
}

inline int lane_idx() { return g_worker->current->lane_idx; }

struct VoteOperands {
  bool predicate;
  unsigned ballot;
};

SIMT_UNCHECKED inline void finish_vote(Worker&, Fiber* warp, uint32_t mask) {
  unsigned ballot = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) {
      ballot |= unsigned{static_cast<VoteOperands*>(warp[lane].operands)->predicate} << lane;
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) {
      static_cast<VoteOperands*>(warp[lane].operands)->ballot = ballot;
    }
  }
}

inline unsigned vote(const char* operation, unsigned mask, int predicate, Location where) {
  VoteOperands operands{predicate != 0, 0};
  meet(operation, mask, &operands, finish_vote, MemoryOrder::kNone, where);
  return operands.ballot;
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = simt::kWarpSize,
              simt::Location where = simt::Location::current()) {
  const int segment = simt::lane_idx() & -width;
  return simt::shuffle("__shfl_sync", mask, value, segment | (source & (width - 1)), where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = simt::kWarpSize,
                  simt::Location where = simt::Location::current()) {
  const int lane = simt::lane_idx();
  const int source = lane ^ lane_mask;
  const bool is_above_segment = (source & -width) > (lane & -width);
  return simt::shuffle("__shfl_xor_sync", mask, value, is_above_segment ? lane : source, where);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = simt::kWarpSize,
                   simt::Location where = simt::Location::current()) {
  const int lane = simt::lane_idx();
  const bool is_outside = (lane & (width - 1)) + static_cast<int>(delta) >= width;
  const int source = is_outside ? lane : lane + static_cast<int>(delta);
  return simt::shuffle("__shfl_down_sync", mask, value, source, where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = simt::kWarpSize,
                 simt::Location where = simt::Location::current()) {
  const int lane = simt::lane_idx();
  const bool is_outside = (lane & (width - 1)) < static_cast<int>(delta);
  const int source = is_outside ? lane : lane - static_cast<int>(delta);
  return simt::shuffle("__shfl_up_sync", mask, value, source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt::Location where = simt::Location::current()) {
  return simt::vote("__ballot_sync", mask, predicate, where);
}

inline int __any_sync(unsigned mask, int predicate,
                      simt::Location where = simt::Location::current()) {
  return simt::vote("__any_sync", mask, predicate, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      simt::Location where = simt::Location::current()) {
  return simt::vote("__all_sync", mask, predicate, where) == mask;
}

// Atomics are relaxed, as on the device: what orders other accesses is a fence on both sides.
inline int atomicAdd(int* address, int value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline int atomicOr(int* address, int value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
inline int atomicExch(int* address, int value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicExch(unsigned* address, unsigned value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}

namespace simt {

template <typename T>
T atomic_max(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, /*weak=*/false,
                                                     __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace simt

inline int atomicMax(int* address, int value) { return simt::atomic_max(address, value); }
inline unsigned atomicMax(unsigned* address, unsigned value) {
  return simt::atomic_max(address, value);
}

// TSan does not know fences: all of them meet in one sync object, in the order they run.
inline void __threadfence() {
#if SIMT_TSAN
  static char sync = 0;
  simt::tsan_release(&sync);
  simt::tsan_acquire(&sync);
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

// Operations that nvcc never contracts into an FMA. Compile with -ffp-contract=off, so that g++
// does not either.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }

// As on the device, of a number and a NaN they return the number.
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
  }
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
  }
}
