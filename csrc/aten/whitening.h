// Powers of the factors, for the coupled averages and for whitened updates.
#pragma once

#include "aten/matrix.h"

namespace dykaf::aten {

// F^-exponent of a factor F in trace normalisation, for each matrix of a batch: [b, s] of a
// diagonal, or [b, s, s]. Undefined: the identity, of a side without a factor.
struct InversePower {
  at::Tensor values;

  bool is_diagonal() const { return values.dim() == 2; }
};

// With roots "exact" the host waits; a decomposition that fails counts as a refresh that did, and
// the diagonal stands in.
InversePower inverse_power(Batch& batch, const Options& options, Side side, double exponent);

// left X and X right, X [b, m, n].
at::Tensor times_left(const InversePower& left, const at::Tensor& X, MatmulPrecision precision);
at::Tensor times_right(const at::Tensor& X, const InversePower& right, MatmulPrecision precision);

}  // namespace dykaf::aten
