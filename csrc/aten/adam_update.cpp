// Adam in the basis (Kingma & Ba 2015; bias correction and eps as in torch.optim.AdamW).
#include <ATen/ops/pow.h>

#include "aten/batch_ops.h"
#include "aten/bounds.h"

namespace dykaf::aten {

at::Tensor rms_of(const Batch& batch, const at::Tensor& updates) {
  return updates.square()
      .mean(at::IntArrayRef({1, 2}), false, batch.wide_dtype())
      .sqrt_()
      .to(at::kFloat);
}

at::Tensor adam_update_(Batch& batch, const Inputs& inputs, const ScaledGradients& gradients) {
  const Options& options = inputs.options;
  const Matrix& first = batch.first();
  const at::Tensor step = batch.get(&Matrix::step).add(1);
  const at::Tensor t = step.to(batch.wide_dtype());
  const auto of_matrix = [&](const at::Tensor& x) { return per_matrix(x.to(batch.dtype())); };
  const auto one_minus_power = [&](double beta) { return at::pow(beta, t).neg_().add_(1); };
  const at::Tensor correction1 = of_matrix(one_minus_power(options.beta1).reciprocal_());
  const at::Tensor correction2 = of_matrix(one_minus_power(options.beta2).rsqrt_());
  const at::Tensor& H = gradients.H;
  const at::Tensor tau = first.is_adamw()
                             ? gradients.tau
                             : gradients.tau.clamp_max(largest_adam_tau_of(H, first.m, first.n));

  at::Tensor G = H;
  if (!first.is_adamw()) {
    const double share = rounding_share_of(H, first.rotated_side());
    G = without_noise(H, of_matrix(gradients.largest.mul(share))).mul_(of_matrix(tau));
  }
  const at::Tensor exp_avg =
      batch.get(&Matrix::exp_avg).mul(options.beta1).add_(G, 1 - options.beta1);
  at::Tensor update = exp_avg.mul(correction1);
  if (options.nesterov && !first.is_adamw()) {
    update.mul_(options.beta1).add_(G, 1 - options.beta1);
  }
  if (first.exp_avg_sq.defined()) {
    const at::Tensor exp_avg_sq =
        batch.get(&Matrix::exp_avg_sq).mul(options.beta2).addcmul_(G, G, 1 - options.beta2);
    update.div_(exp_avg_sq.sqrt().mul_(correction2).add_(options.eps));
    batch.set(&Matrix::exp_avg_sq, exp_avg_sq);
  } else if (options.second_moment != SecondMoment::kNone) {
    const RootFactors root = compact_second_moment_(batch, options, H, tau);
    const at::Tensor row = root.row.unsqueeze(2).mul(correction2);
    // Row and column means can be far below an entry's own second moment.
    const at::Tensor bound = of_matrix(update_bounds(options, t));
    update.div_(row.mul(root.col.unsqueeze(1)).add_(options.eps));
    update = update.clamp(bound.neg(), bound);
  }
  batch.set(&Matrix::step, step);
  batch.set(&Matrix::exp_avg, exp_avg);
  batch.set(&Matrix::update_rms, rms_of(batch, update));
  return update;
}

}  // namespace dykaf::aten
