// dykaf/whitening.h for batches.
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/zeros_like.h>

#include "aten/batch_ops.h"
#include "aten/bounds.h"
#include "aten/decompositions.h"
#include "aten/products.h"
#include "aten/whitening.h"
#include "dykaf/whitening.h"

namespace dykaf::aten {
namespace {

// Of eigenvalues or diagonals [..., s]; zero where they are all zero.
at::Tensor inverse_powers(const at::Tensor& values, double exponent, at::ScalarType wide) {
  const at::Tensor x = values.to(wide);
  const double share = rounding_share_of(values, values.size(-1));
  const at::Tensor least = x.amax(-1, /*keepdim=*/true).mul_(share);
  const at::Tensor mean = x.mean(at::IntArrayRef({-1}), /*keepdim=*/true);
  const at::Tensor powers = at::maximum(x, least).div_(mean).pow_(-exponent);
  return at::where(mean.gt(0), powers, at::zeros_like(powers)).to(values.scalar_type());
}

}  // namespace

InversePower inverse_power(Batch& batch, const Options& options, Side side, double exponent) {
  const Array factor = side == Side::kLeft ? &Matrix::L : &Matrix::R;
  if (!(batch.first().*factor).defined()) return {};
  const at::Tensor F = batch.get(factor);
  const at::Tensor diagonals = inverse_powers(F.diagonal(0, -2, -1), exponent, batch.wide_dtype());
  if (options.roots == Roots::kTracked) return {diagonals};
  const Eigen eigen = settled_eigenvectors(F);
  const at::Tensor scaled =
      eigen.vectors.mul(inverse_powers(eigen.values, exponent, batch.wide_dtype()).unsqueeze(1));
  batch.set(&Matrix::refresh_fallbacks,
            batch.get(&Matrix::refresh_fallbacks).add(eigen.sound.logical_not()));
  return {at::where(per_matrix(eigen.sound), full_product(scaled, eigen.vectors.mT()),
                    at::diag_embed(diagonals))};
}

at::Tensor times_left(const InversePower& left, const at::Tensor& X, MatmulPrecision precision) {
  if (!left.values.defined()) return X;
  return left.is_diagonal() ? X.mul(left.values.unsqueeze(2)) : product(left.values, X, precision);
}

at::Tensor times_right(const at::Tensor& X, const InversePower& right, MatmulPrecision precision) {
  if (!right.values.defined()) return X;
  return right.is_diagonal() ? X.mul(right.values.unsqueeze(1))
                             : product(X, right.values, precision);
}

at::Tensor whitened_update_(Batch& batch, const Inputs& inputs, const ScaledGradients& gradients) {
  const Options& options = inputs.options;
  factor_update_(batch, inputs, gradients);
  const InversePower left = inverse_power(batch, options, Side::kLeft, options.exponent);
  const InversePower right = inverse_power(batch, options, Side::kRight, options.exponent);
  const auto whitened = [&](const at::Tensor& X) {
    return times_right(times_left(left, X, options.precision), right, options.precision);
  };
  const auto of_matrix = [&](const at::Tensor& x) { return per_matrix(x.to(batch.dtype())); };
  const auto norms = [&](const at::Tensor& X) {
    return at::linalg_vector_norm(X, 2, at::IntArrayRef({1, 2}), false, batch.wide_dtype());
  };

  const double share = rounding_share_of(gradients.H, batch.first().rotated_side());
  const at::Tensor H = without_noise(gradients.H, of_matrix(gradients.largest.mul(share)));
  const at::Tensor factor = batch.get(batch.first().L.defined() ? &Matrix::L : &Matrix::R);
  const at::Tensor mean =
      factor.diagonal(0, 1, 2).mean(at::IntArrayRef({1}), false, batch.wide_dtype());
  const at::Tensor root = batch.get(&Matrix::rho).select(1, 0).mul(mean.sqrt());
  // Where zero gradients have let rho vanish the quotient would overflow.
  const at::Tensor gain =
      at::where(gradients.largest.gt(0), gradients.tau.div(root), at::zeros_like(root))
          .mul_(1 - options.beta1);
  const at::Tensor newest =
      (options.momentum == Momentum::kWhitened ? whitened(H) : H).mul(of_matrix(gain));
  const at::Tensor exp_avg = batch.get(&Matrix::exp_avg).mul(options.beta1).add_(newest);
  const at::Tensor step = batch.get(&Matrix::step).add(1);
  at::Tensor average = exp_avg;
  if (options.nesterov) {
    const at::Tensor t = step.to(batch.wide_dtype());
    const at::Tensor correction = at::pow(options.beta1, t).neg_().add_(1).reciprocal_();
    average = exp_avg.mul(of_matrix(correction.mul_(options.beta1))).add_(newest);
  }
  if (options.momentum == Momentum::kPlain) average = whitened(average);
  const at::Tensor orthogonal = orthogonalized_(batch, options, average);
  at::Tensor update = whitened(orthogonal);
  if (options.graft) {
    const at::Tensor norm = norms(update);
    const at::Tensor divisor = at::where(norm.gt(0), norm, at::ones_like(norm));
    update = update.mul(of_matrix(norms(orthogonal).div_(divisor)));
  }
  batch.set(&Matrix::step, step);
  batch.set(&Matrix::exp_avg, exp_avg);
  batch.set(&Matrix::update_rms, rms_of(batch, update));
  return update;
}

}  // namespace dykaf::aten
