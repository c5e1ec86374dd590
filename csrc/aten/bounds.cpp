#include "aten/bounds.h"

#include <ATen/ops/pow.h>
#include <ATen/ops/zeros_like.h>

namespace dykaf::aten {

at::Tensor momentum_bounds(const Options& options, const at::Tensor& steps) {
  const double q = options.beta2 > 0 ? options.beta1 * options.beta1 / options.beta2 : 1.0;
  const at::Tensor sum = q == 1 ? steps : at::pow(q, steps).sub_(1).div_(q - 1);
  const double gain = (1 - options.beta1) * (1 - options.beta1) / (1 - options.beta2);
  const at::Tensor bounds = sum.mul(gain);
  return q >= 1 ? bounds.clamp_max(1) : bounds;
}

at::Tensor momentum_floors(const Options& options, const at::Tensor& steps) {
  const at::Tensor bounds = momentum_bounds(options, steps);
  return at::where(steps.gt(0), bounds.reciprocal(), at::zeros_like(bounds));
}

at::Tensor update_bounds(const Options& options, const at::Tensor& steps) {
  const at::Tensor left = at::pow(options.beta2, steps).neg_().add_(1);
  const at::Tensor bounds = momentum_bounds(options, steps)
                                .mul_(left)
                                .sqrt_()
                                .div_(at::pow(options.beta1, steps).neg_().add_(1));
  if (!options.nesterov) return bounds;
  return bounds.mul_(options.beta1).add_(left.div(1 - options.beta2).sqrt_(), 1 - options.beta1);
}

at::Tensor without_noise(const at::Tensor& x, const at::Tensor& noise) {
  return at::where(x.abs().lt(noise), at::zeros_like(x), x);
}

}  // namespace dykaf::aten
