// Rows of eight elements: 16 bytes of 16-bit numbers, or twice 16 bytes of floats.
#pragma once

#include "cuda/kernels/device/ptx.cuh"
#include "dykaf/rounding.h"
#include "dykaf/types.h"

namespace dykaf::cuda {

inline constexpr int kUnit = 8;

// Whether units that start at multiples of `stride` elements of `bytes` bytes from p are aligned.
DYKAF_DEVICE bool is_aligned(const void* p, int64_t stride, int bytes) {
  return ((reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(stride * bytes)) & 15u) == 0;
}

DYKAF_DEVICE int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

DYKAF_DEVICE float to_float(uint16_t bits, DType dtype) {
  return dtype == DType::kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

// The first `count` elements at p; the others are zero. `aligned`: p is, so that a whole unit may
// be read at once.
DYKAF_DEVICE void load_unit(const float* p, int count, bool aligned, float (&x)[kUnit]) {
  if (aligned && count == kUnit) {
    const float4 lo = load_global4(p);
    const float4 hi = load_global4(p + 4);
    x[0] = lo.x, x[1] = lo.y, x[2] = lo.z, x[3] = lo.w;
    x[4] = hi.x, x[5] = hi.y, x[6] = hi.z, x[7] = hi.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) x[i] = i < count ? p[i] : 0.0f;
}

DYKAF_DEVICE void store_unit(float* p, int count, bool aligned, const float (&x)[kUnit]) {
  if (aligned && count == kUnit) {
    store_global4(p, make_float4(x[0], x[1], x[2], x[3]));
    store_global4(p + 4, make_float4(x[4], x[5], x[6], x[7]));
    return;
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if (i < count) p[i] = x[i];
  }
}

DYKAF_DEVICE void load_unit_bits(const uint16_t* p, int count, bool aligned, uint16_t (&x)[kUnit]) {
  if (aligned && count == kUnit) {
    const uint4 v = load_global_16bytes(p);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < kUnit; ++i) x[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    return;
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) x[i] = i < count ? p[i] : uint16_t{0};
}

DYKAF_DEVICE void store_unit_bits(uint16_t* p, int count, bool aligned,
                                  const uint16_t (&x)[kUnit]) {
  if (aligned && count == kUnit) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = static_cast<uint32_t>(x[2 * i]) | static_cast<uint32_t>(x[2 * i + 1]) << 16;
    }
    store_global_16bytes(p, make_uint4(words[0], words[1], words[2], words[3]));
    return;
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if (i < count) p[i] = x[i];
  }
}

// The same for an array in `dtype`, from element `start`.
DYKAF_DEVICE void load_unit(const void* base, DType dtype, int64_t start, int count, bool aligned,
                            float (&x)[kUnit]) {
  if (dtype == DType::kFloat32) {
    load_unit(static_cast<const float*>(base) + start, count, aligned, x);
    return;
  }
  uint16_t bits[kUnit];
  load_unit_bits(static_cast<const uint16_t*>(base) + start, count, aligned, bits);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) x[i] = to_float(bits[i], dtype);
}

}  // namespace dykaf::cuda
