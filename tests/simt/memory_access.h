// Loads and stores of kernels that are checked or counted on the host.
#pragma once

#include <cstdint>

#include "banks.h"
#include "vector_types.h"

namespace simt {

inline void check_alignment(const char* operation, const void* address, unsigned bytes,
                            Location where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail("misaligned access:", enter_operation(operation, where));
  }
}

}  // namespace simt

namespace dykaf::cuda {

inline float load_shared(const float* address, simt::Location where = simt::Location::current()) {
  simt::log_shared_load("load_shared", address, sizeof(float), where);
  return *address;
}

inline float2 load_shared2(const float* address, simt::Location where = simt::Location::current()) {
  simt::check_alignment("load_shared2", address, sizeof(float2), where);
  simt::log_shared_load("load_shared2", address, sizeof(float2), where);
  return *reinterpret_cast<const float2*>(address);
}

inline float4 load_global4(const float* address, simt::Location where = simt::Location::current()) {
  simt::check_alignment("load_global4", address, sizeof(float4), where);
  return *reinterpret_cast<const float4*>(address);
}

inline void store_global4(float* address, float4 value,
                          simt::Location where = simt::Location::current()) {
  simt::check_alignment("store_global4", address, sizeof(float4), where);
  *reinterpret_cast<float4*>(address) = value;
}

inline uint4 load_global_16bytes(const void* address,
                                 simt::Location where = simt::Location::current()) {
  simt::check_alignment("load_global_16bytes", address, sizeof(uint4), where);
  return *static_cast<const uint4*>(address);
}

inline void store_global_16bytes(void* address, uint4 value,
                                 simt::Location where = simt::Location::current()) {
  simt::check_alignment("store_global_16bytes", address, sizeof(uint4), where);
  *static_cast<uint4*>(address) = value;
}

}  // namespace dykaf::cuda
