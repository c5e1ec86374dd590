// What the refreshes of all backends share, on any device.
#pragma once

#include "aten/matrix.h"
#include "aten/orthonormalize.h"

namespace dykaf::aten {

// Q P drifts from orthogonality by a few units of rounding per refresh; one Newton-Schulz step in
// this many refreshes removes the drift, whose square it leaves.
inline constexpr int64_t kRefreshesPerCorrection = 32;

// Q (3 I - Q^T Q) / 2, of one matrix or a batch.
at::Tensor orthonormalized(const at::Tensor& Q);

// The bases [b, n, k] of `side`, that of those whose next refresh is the one of the correction.
at::Tensor corrected_where_due(const Batch& batch, Side side, const at::Tensor& bases);

// Factors [..., n, n] of unit norm without rows and columns that are nothing but rounding of
// gradients: those directions would turn at random.
at::Tensor without_noise_rows(const at::Tensor& F);

// Of factors [b, n, n], as csrc/cpu/refresh_basis.cpp has it.
struct PowerIteration {
  at::Tensor diagonal;  // [b, n], of the old factor, descending
  at::Tensor order;     // [b, n], its places
  at::Tensor P;         // [b, n, n], what the basis is multiplied by
  at::Tensor F;         // [b, n, n], in the new basis
  at::Tensor sound;     // bool [b]
  at::Tensor stays;     // bool [b, 1, 1]: not sound or skipped; order and P are the identity
};
PowerIteration power_iteration(const at::Tensor& F, Orthonormalizer orthonormalizer,
                               const std::optional<at::Tensor>& skip = std::nullopt);

// By how much entries of exp_avg_sq grow along a side whose factor's sorted diagonal changes so:
// clamp(new_i / old_i, 0.1, 10), or 1 without rescaling or where one of them is rounding of the
// factor, whose norm (of a long side: trace) is 1.
at::Tensor growth(const Options& options, const at::Tensor& old_diagonal,
                  const at::Tensor& new_diagonal);

// One power iteration of the bases of `side`, none of them a skinny matrix's long one, as in
// csrc/cpu/refresh_basis.cpp; changes the matrices at its end alone.
void refresh_basis_(Batch& batch, const Inputs& inputs, Side side, Orthonormalizer orthonormalizer);

}  // namespace dykaf::aten
