// The operations of dykaf/ops.h on tensors of any device, in torch's own operations. Matrices that
// are alike are worked on as one batch, so that launches do not grow with their number, and no host
// waits for a device but at a first gradient. Where an operation throws, each matrix is as before
// or done.
#pragma once

#include <cstddef>
#include <vector>

#include "aten/matrix.h"
#include "dykaf/ops.h"
#include "dykaf/schedule.h"

namespace dykaf::aten {

using Matrices = std::vector<Matrix>;

// Of each gradient, in `dtype`; NaN where an entry is not finite. The gradients may differ in
// dtype.
at::Tensor grad_max(const std::vector<at::Tensor>& gradients, at::ScalarType dtype);

// update = Q_L^T grad Q_R, or Q_L grad Q_R^T; all of the state's dtype.
void rotate(const Matrices& matrices, const Inputs& inputs, Rotation rotation);

// Of rotated gradients `grad`; writes D to `update`.
void adam_update_(const Matrices& matrices, const Inputs& inputs);

// Of `update`, in place.
void orthogonalize_(const Matrices& matrices, const Inputs& inputs);

// Of `update`.
void apply_update_(const Matrices& matrices, const Inputs& inputs);

// Of rotated gradients `grad`.
void factor_update_(const Matrices& matrices, const Inputs& inputs);

// A matrix whose gradient is zero is marked kSawZero (dykaf/schedule.h). Where it throws all are as
// before their first gradient.
void initialize_(const Matrices& matrices, const Inputs& inputs);

// One matrix, whose gradient is not zero. Where it throws the matrix is in between.
void initialize_(const Matrix& w, const Inputs& inputs);

// As a matrix is before its first gradient.
void reset_(const Matrix& w);

// Returns the places of matrices whose refresh could not be done, for lack of memory, say: their
// old bases stay.
std::vector<size_t> refresh_basis_(const Matrices& matrices, const Inputs& inputs, Side side);
std::vector<size_t> refresh_due_(const Matrices& matrices, const Inputs& inputs);

// The step of a list of matrices, in the parts of dykaf/ops.h's. A batch that memory is lacking for
// fails, and is as before; the others are done.
class Step {
 public:
  Step(Matrices matrices, const Inputs& inputs, Refreshes refreshes);

  bool has_fresh() const { return !places_.fresh.empty(); }
  // Waits for the device.
  void initialize_();
  void reset_();
  // Waits for nothing.
  StepReport run_();

 private:
  Matrices matrices_;
  Inputs inputs_;
  Refreshes refreshes_;
  StepPlaces places_;
};

}  // namespace dykaf::aten
