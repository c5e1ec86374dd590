// Stochastic rounding of float to bfloat16 and float16, from a counter-based generator: the random
// bits depend on (seed, stream, step, element) alone, so runs repeat and resume exactly, for any
// number of threads and on any backend.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace dykaf {

// The finaliser of splitmix64 (Steele, Lea & Flood 2014).
inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

inline uint64_t rounding_key(uint64_t seed, uint64_t stream, uint64_t step) {
  return mix64(mix64(mix64(seed + 0x9e3779b97f4a7c15ull) + stream) + step);
}

inline uint32_t random_bits(uint64_t key, uint64_t element) {
  return static_cast<uint32_t>(mix64(key + element * 0x9e3779b97f4a7c15ull) >> 32);
}

// The bits of a bfloat16: the 16 dropped bits of x round up with a probability equal to their
// fraction. The carry runs through to infinity as in rounding to nearest.
inline uint16_t round_to_bfloat16(float x, uint32_t random) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if (!std::isfinite(x)) return static_cast<uint16_t>((bits >> 16) | (std::isnan(x) ? 0x40u : 0u));
  bits += random >> 16;
  return static_cast<uint16_t>(bits >> 16);
}

// x rounded to a multiple of float16's spacing at x, as a float that float16 holds exactly. Below
// 2^-14 the spacing is 2^-24 throughout; beyond 65504 the result is infinite.
inline float round_to_float16(float x, uint32_t random) {
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

}  // namespace dykaf
