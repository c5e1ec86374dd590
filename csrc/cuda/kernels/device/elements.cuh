// What happens to one element: Adam, and the parameter's update in its dtype.
#pragma once

#include "cuda/kernels/device/vector.cuh"
#include "cuda/kernels/matrices.h"
#include "dykaf/newton_schulz.h"

namespace dykaf::cuda {

DYKAF_DEVICE float blend_momentum(float exp_avg, float g, const AdamOptions& o) {
  return o.beta1 * exp_avg + o.one_minus_beta1 * g;
}

DYKAF_DEVICE float gradient_of(float h, const MatrixScalars& s) {
  return fabsf(h) < s.noise ? 0.0f : s.adam_tau * h;
}

// What Adam divides by the root of the second moment, after bias correction.
DYKAF_DEVICE float numerator(float exp_avg, float g, const MatrixScalars& s) {
  return s.of_momentum * exp_avg + s.of_gradient * g;
}

// Adam with the gradient of h for the unit from element `start` (Kingma & Ba 2015; eps as in
// torch.optim.AdamW). `aligned`: whole units of exp_avg and exp_avg_sq may move at once. Without a
// second moment the update is the numerator.
DYKAF_DEVICE void adam_unit_(const MatrixOnDevice& p, const MatrixScalars& s, const AdamOptions& o,
                             int64_t start, int count, bool aligned, const float (&h)[kUnit],
                             float (&update)[kUnit]) {
  float exp_avg[kUnit];
  float g[kUnit];
  load_unit(p.exp_avg + start, count, aligned, exp_avg);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    g[i] = gradient_of(h[i], s);
    exp_avg[i] = blend_momentum(exp_avg[i], g[i], o);
    update[i] = numerator(exp_avg[i], g[i], s);
  }
  store_unit(p.exp_avg + start, count, aligned, exp_avg);
  if (p.exp_avg_sq == nullptr) return;
  float exp_avg_sq[kUnit];
  load_unit(p.exp_avg_sq + start, count, aligned, exp_avg_sq);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    exp_avg_sq[i] = o.beta2 * exp_avg_sq[i] + o.one_minus_beta2 * g[i] * g[i];
    update[i] /= sqrtf(exp_avg_sq[i]) * s.correction2 + o.eps;
  }
  store_unit(p.exp_avg_sq + start, count, aligned, exp_avg_sq);
}

DYKAF_DEVICE uint16_t nearest(float x, DType dtype) {
  return dtype == DType::kBFloat16 ? nearest_bfloat16(x) : nearest_float16(x);
}

DYKAF_DEVICE uint16_t stochastic(float x, DType dtype, uint32_t random) {
  // round_to_float16 leaves nothing to round.
  return dtype == DType::kBFloat16 ? round_to_bfloat16(x, random)
                                   : nearest_float16(round_to_float16(x, random));
}

// 1 / t^2 of a Newton-Schulz step; null and 0 stand for 1.
DYKAF_DEVICE float inverse_bound(const float* bound) {
  return bound == nullptr || *bound == 0.0f ? 1.0f : 1.0f / *bound;
}

// orthogonal_scale of a matrix with this long side, of whose direction `update_rms` still is the
// root mean square.
DYKAF_DEVICE float update_scale(float side, float full_rms, const float* update_rms) {
  const float scale = static_cast<float>(kOrthogonalRms) * sqrtf(side);
  return full_rms == 0.0f ? scale : scale * fminf(1.0f, *update_rms / full_rms);
}

// scale (a x + product).
DYKAF_DEVICE float quintic(float x, float product, float scale) {
  return scale * (static_cast<float>(NewtonSchulz::kA) * x + product);
}

// What a parameter may be: Place is read of a shard alone.
enum class Extent { kWhole, kShard };

// param <- param (1 - lr weight_decay) - lr update for the unit from element `start`. `aligned` and
// `master_aligned` say whether whole units of the parameter and of the master may move at once.
template <Extent kExtent>
DYKAF_DEVICE void apply_unit_(const MatrixOnDevice& p, const MatrixScalars& s, int64_t start,
                              int count, bool aligned, bool master_aligned,
                              const float (&update)[kUnit]) {
  float value[kUnit];
  if (p.master != nullptr) {
    load_unit(p.master + start, count, master_aligned, value);
  } else {
    load_unit(p.param, p.dtype, start, count, aligned, value);
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) value[i] = value[i] * s.keep - s.lr * update[i];

  if (p.master != nullptr) store_unit(p.master + start, count, master_aligned, value);
  if (p.dtype == DType::kFloat32) {
    store_unit(static_cast<float*>(p.param) + start, count, aligned, value);
    return;
  }
  uint16_t bits[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    uint64_t element = static_cast<uint64_t>(start + i);
    if (kExtent == Extent::kShard) element = p.place.element(element);
    bits[i] = p.master != nullptr
                  ? nearest(value[i], p.dtype)
                  : stochastic(value[i], p.dtype, random_bits(s.rounding_key, element));
  }
  store_unit_bits(static_cast<uint16_t*>(p.param) + start, count, aligned, bits);
}

}  // namespace dykaf::cuda
