#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>

#include <limits>

#include "aten/batch_ops.h"

namespace dykaf::aten {

ScaledGradients scaled_gradients(const Batch& batch, const Inputs& inputs) {
  const auto options = at::TensorOptions().dtype(batch.wide_dtype()).device(batch.device());
  at::Tensor scale = at::full({1}, inputs.options.grad_scale, options);
  if (inputs.amp_scale) scale.div_(inputs.amp_scale->to(batch.wide_dtype()));
  at::Tensor largest = batch.get(&Matrix::grad_max).to(batch.wide_dtype()).mul(scale.abs());

  at::Tensor tau = at::ones_like(largest);
  if (!batch.first().is_adamw()) {
    // Two powers of two short of the limits: tau and 1 / tau are normal, and 4 tau is finite.
    const int most = (batch.dtype() == at::kDouble ? std::numeric_limits<double>::max_exponent
                                                   : std::numeric_limits<float>::max_exponent) -
                     3;
    const at::Tensor size = at::maximum(largest, batch.get(&Matrix::rho).amax(1));
    const at::Tensor power = size.log2().ceil_().clamp_(-most, most).exp2_();
    tau = at::where(size.gt(0), power, tau);
  }
  const at::Tensor factor = per_matrix(scale.div(tau).to(batch.dtype()));
  return {batch.get(&Matrix::grad).to(batch.dtype()).mul(factor), tau, largest.div_(tau)};
}

}  // namespace dykaf::aten
