// Conversions between float and the bits of bfloat16 and float16, to nearest and stochastic. The
// random bits come from a counter-based generator and depend on (seed, stream, step, element)
// alone, so runs repeat and resume exactly, for any number of threads, on any backend, and however
// a matrix is cut into shards.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DYKAF_HOST_DEVICE __host__ __device__
#else
#define DYKAF_HOST_DEVICE
#endif

namespace dykaf {

// The finaliser of splitmix64 (Steele, Lea & Flood 2014).
DYKAF_HOST_DEVICE inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

inline constexpr uint64_t kElementStride = 0x9e3779b97f4a7c15ull;

DYKAF_HOST_DEVICE inline uint64_t stream_key(uint64_t seed, uint64_t stream) {
  return mix64(mix64(seed + kElementStride) + stream);
}

DYKAF_HOST_DEVICE inline uint64_t rounding_key(uint64_t seed, uint64_t stream, uint64_t step) {
  return mix64(stream_key(seed, stream) + step);
}

// Which elements of a whole matrix those of a shard are: runs of `run` elements that start `stride`
// apart, from `first` on. run = 0: all of them in one run.
struct Place {
  uint64_t first;
  uint64_t run;
  uint64_t stride;

  DYKAF_HOST_DEVICE uint64_t element(uint64_t i) const {
    return first + (run == 0 ? i : i / run * stride + i % run);
  }
};

DYKAF_HOST_DEVICE inline uint32_t random_bits(uint64_t key, uint64_t element) {
  return static_cast<uint32_t>(mix64(key + element * kElementStride) >> 32);
}

// The bits of a bfloat16: the 16 dropped bits of x round up with a probability equal to their
// fraction. The carry runs through to infinity as in rounding to nearest.
DYKAF_HOST_DEVICE inline uint16_t round_to_bfloat16(float x, uint32_t random) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if (!std::isfinite(x)) return static_cast<uint16_t>((bits >> 16) | (std::isnan(x) ? 0x40u : 0u));
  bits += random >> 16;
  return static_cast<uint16_t>(bits >> 16);
}

// x rounded to a multiple of float16's spacing at x, as a float that float16 holds exactly. Below
// 2^-14 the spacing is 2^-24 throughout; beyond 65504 the result is infinite.
DYKAF_HOST_DEVICE inline float round_to_float16(float x, uint32_t random) {
  if (!std::isfinite(x)) return x;
  const float magnitude = std::fabs(x);
  float rounded;
  if (magnitude < 0x1p-14f) {
    const float uniform = static_cast<float>(random >> 8) * 0x1p-24f;
    rounded = std::floor(magnitude * 0x1p24f + uniform) * 0x1p-24f;
  } else {
    const uint32_t bits = std::bit_cast<uint32_t>(magnitude) + (random >> 19);
    rounded = std::bit_cast<float>(bits & ~0x1fffu);
    if (rounded > 65504.0f) rounded = HUGE_VALF;
  }
  return std::copysign(rounded, x);
}

DYKAF_HOST_DEVICE inline float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// To nearest, ties to even.
DYKAF_HOST_DEVICE inline uint16_t nearest_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

DYKAF_HOST_DEVICE inline float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  // As a float the fields stand for 2^-112 times the value; infinity and NaN keep a full exponent.
  const uint32_t value = (bits & 0x7c00u) == 0x7c00u
                             ? magnitude | 0x7f800000u
                             : std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>(value | sign);
}

// To nearest, ties to even.
DYKAF_HOST_DEVICE inline uint16_t nearest_float16(float x) {
  const uint32_t sign = (std::bit_cast<uint32_t>(x) >> 16) & 0x8000u;
  const float magnitude = std::fabs(x);
  uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  if (std::isnan(x)) {
    bits = 0x7e00u;
  } else if (magnitude >= 65520.0f) {
    bits = 0x7c00u;  // half a unit and more above the largest number
  } else if (magnitude < 0x1p-14f) {
    // From 1/2 to 1 floats are spaced as these float16s are, so that the sum rounds as it must.
    bits = std::bit_cast<uint32_t>(magnitude + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  } else {
    bits = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | bits);
}

}  // namespace dykaf
