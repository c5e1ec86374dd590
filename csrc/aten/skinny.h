// Skinny matrices: dykaf/types.h has their state, docs/algorithm.md the mathematics. The
// integrator is the diagonal one of metric power 0, the average of G G^T and G^T G. The matrices of
// a batch have the same rows in use.
#pragma once

#include "aten/batch_ops.h"
#include "aten/orthonormal_rows.h"

namespace dykaf::aten {

// Adam and the factors, with gradients that are not rotated. Returns the
// updates [b, m, n] in the original coordinates.
at::Tensor skinny_step_(Batch& batch, const Inputs& inputs, const ScaledGradients& gradients);

// Counts the rows that a step adds to the bases; also those of a step that is skipped: rows that
// were not written weigh nothing, for their part of `core` is zero.
void count_rows_(const Batch& batch);

// The first gradients; commits. Waits for the device.
void initialize_skinny_(Batch& batch, const Options& options, const ScaledGradients& gradients);

// Second moments [..., s, k + 1] that are at least what the momentum [..., s, l] in the directions
// V
// [..., inner, l] and beyond them needs (dykaf/bounds.h) after `steps` [...].
at::Tensor bounded_second_moment(const at::Tensor& exp_avg_sq, const Options& options,
                                 const at::Tensor& exp_avg, const at::Tensor& V,
                                 const at::Tensor& steps);

// Whether a refresh looks at what it finds on its way, to do less: not where the host would wait.
enum class Looks : int32_t { kNever, kOnHost };

// One power iteration of the bases of the long sides, of which the gradients become part; commits.
// Also in a step that is skipped, for the host counts the rows of a basis.
void refresh_long_(Batch& batch, const Options& options, Looks looks = Looks::kNever);

// What is left to a refresh of the long side that cannot be done: the old basis, without the
// gradients since, so that there is room for others.
void forget_gradients_(const Matrix& w);

// What lies outside of V, from sums of squares over a row and over its part in V: a mean over `num`
// coordinates, the same in any basis.
at::Tensor mean_outside(const Options& options, const at::Tensor& total, const at::Tensor& inside,
                        int64_t num);

// M V^T of momenta [..., s, l] and V [..., k, l], where it is more than rounding of M's rows.
at::Tensor momentum_in(const at::Tensor& V, const at::Tensor& exp_avg);

}  // namespace dykaf::aten
