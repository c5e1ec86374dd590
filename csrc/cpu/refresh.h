// What the refreshes of all backends share, on any device.
#pragma once

#include "cpu/aten.h"
#include "dykaf/types.h"

namespace dykaf::cpu {

// Q P drifts from orthogonality by a few units of rounding per refresh; one Newton-Schulz step in
// this many refreshes removes the drift, whose square it leaves.
inline constexpr int64_t kRefreshesPerCorrection = 32;

// Q (3 I - Q^T Q) / 2, of one matrix or a batch.
at::Tensor orthonormalized(const at::Tensor& Q);

// By how much entries of exp_avg_sq grow along a side whose factor's sorted diagonal changes so:
// clamp(new_i / old_i, 0.1, 10), or 1 without rescaling or where the old entry is 0.
at::Tensor growth(const Options& options, const at::Tensor& old_diagonal,
                  const at::Tensor& new_diagonal);

}  // namespace dykaf::cpu
