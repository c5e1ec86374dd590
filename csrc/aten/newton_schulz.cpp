#include "dykaf/newton_schulz.h"

#include <ATen/ops/linalg_vector_norm.h>

#include <cmath>

#include "aten/batch_ops.h"
#include "aten/products.h"

namespace dykaf::aten {

at::Tensor orthogonalized_(Batch& batch, const Options& options, const at::Tensor& updates) {
  const Matrix& first = batch.first();
  const auto norm_of = [&](const at::Tensor& matrices) {
    return at::linalg_vector_norm(matrices, 2, at::IntArrayRef({1, 2}), false, batch.wide_dtype());
  };
  const at::Tensor norm = norm_of(updates);
  // Zero stays zero.
  const at::Tensor divisor = at::where(norm.gt(0), norm, at::ones_like(norm)).to(batch.dtype());
  at::Tensor X = updates.div(per_matrix(divisor));
  if (first.m > first.n) X = X.mT();
  for (int64_t i = 0; i < options.orthogonalize; ++i) {
    at::Tensor A = product(X, X.mT(), options.precision);
    if (i == 0 && starts_from_gram(options)) {
      const at::Tensor bound =
          per_matrix(at::where(norm.gt(0), norm_of(A), at::ones_like(norm)).to(batch.dtype()));
      X = X.div(bound.sqrt());
      A = A.div(bound);
    }
    const at::Tensor B =
        A.mul(NewtonSchulz::kB).add_(product(A, A, options.precision), NewtonSchulz::kC);
    X = X.mul(NewtonSchulz::kA).add_(product(B, X, options.precision));
  }
  if (first.m > first.n) X = X.mT();
  at::Tensor result = X.mul(orthogonal_scale(first.m, first.n));
  if (const double least = full_rms(options); least > 0) {
    const double full_norm = least * std::sqrt(static_cast<double>(first.size()));
    result.mul_(per_matrix(norm.div(full_norm).clamp_max_(1).to(batch.dtype())));
  }
  batch.set(&Matrix::update_rms, rms_of(batch, result));
  return result;
}

}  // namespace dykaf::aten
