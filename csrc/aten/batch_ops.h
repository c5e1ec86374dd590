// The operations on one batch, from which ops.h's list forms and the step are made. What they
// change is staged in the batch.
#pragma once

#include "aten/matrix.h"

namespace dykaf::aten {

// The gradients over tau, a power of two of the size of each or of its factors, so that nothing
// overflows or vanishes (docs/algorithm.md).
struct ScaledGradients {
  at::Tensor H;        // [b, m, n], grad_scale G / tau
  at::Tensor tau;      // [b]; 1 without factors
  at::Tensor largest;  // [b], max|H|
};
ScaledGradients scaled_gradients(const Batch& batch, const Inputs& inputs);

// Q_L^T X Q_R or Q_L X Q_R^T of X [b, m, n].
at::Tensor rotated(const Batch& batch, const at::Tensor& X, Rotation rotation,
                   MatmulPrecision precision);

// Adam in the basis, with rotated gradients; returns D [b, m, n].
at::Tensor adam_update_(Batch& batch, const Inputs& inputs, const ScaledGradients& gradients);

// Root mean square of each of [b, m, n].
at::Tensor rms_of(const Batch& batch, const at::Tensor& updates);

// Root of the compact second moment, advanced with the gradients tau H, as factors: row_i col_j.
struct RootFactors {
  at::Tensor row;  // [b, m]
  at::Tensor col;  // [b, n]
};
RootFactors compact_second_moment_(Batch& batch, const Options& options, const at::Tensor& H,
                                   const at::Tensor& tau);

// The updates [b, m, n] after Newton-Schulz steps, times dykaf/newton_schulz.h's scale.
at::Tensor orthogonalized_(Batch& batch, const Options& options, const at::Tensor& updates);

// The factors' and the momentum's step with rotated gradients, where updates are whitened; returns
// U [b, m, n].
at::Tensor whitened_update_(Batch& batch, const Inputs& inputs, const ScaledGradients& gradients);

// W <- W (1 - lr weight_decay) - lr update, with updates [b, m, n].
void apply_update_(Batch& batch, const Inputs& inputs, const at::Tensor& updates);

// The integrator's step with rotated gradients.
void factor_update_(Batch& batch, const Inputs& inputs, const ScaledGradients& gradients);

// rho and factors of the prior (docs/algorithm.md, "The first gradient") for gradients tau H.
void set_identity_prior_(Batch& batch, const Options& options, const ScaledGradients& gradients,
                         const at::Tensor& where);

// The whole step of matrices that have had their first gradient, but for refreshes; commits.
void step_(Batch& batch, const Inputs& inputs);

// One power iteration of the bases of `side`, none of them a skinny matrix's long one; commits.
void refresh_basis_(Batch& batch, const Inputs& inputs, Side side);

}  // namespace dykaf::aten
