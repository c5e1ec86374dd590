#include "aten/orthonormalize.h"

#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>

#include "aten/decompositions.h"
#include "aten/products.h"

namespace dykaf::aten {
namespace {

constexpr double kDamping = 1e-2;
// After one pass Q^T Q - I is at most 8 u / r^2 (u: unit roundoff, r: the least diagonal entry of
// the Cholesky factor), 0.12 from this r on; a second pass leaves its square and rounding.
double least_pivot(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? 8.6e-8 : 2e-3; }
// Shorter columns, relative to the longest, are not brought to unit length: they may be zero.
constexpr double kLeastLength = 1e-6;

struct Cholesky {
  at::Tensor factor;  // [b, n, n], upper triangular
  at::Tensor sound;   // bool [b]
};

Cholesky cholesky(const at::Tensor& gram) {
  auto [factor, info] = at::linalg_cholesky_ex(gram, /*upper=*/true, /*check_errors=*/false);
  // A NaN is not at least anything. Where info is not 0 libraries leave what they like in factor.
  const at::Tensor sound =
      info.eq(0).logical_and(factor.diagonal(0, 1, 2).amin(1).ge(least_pivot(gram)));
  return {std::move(factor), sound};
}

at::Tensor gram(const at::Tensor& X) { return full_product(X.transpose(1, 2), X); }

at::Tensor divide(const at::Tensor& X, const at::Tensor& upper) {
  return at::linalg_solve_triangular(upper, X, /*upper=*/true, /*left=*/false);
}

}  // namespace

Orthonormalized cholesky_orthonormalize(const at::Tensor& given) {
  const at::Tensor X = decomposable(given);
  const at::Tensor lengths = at::linalg_vector_norm(X, 2, at::IntArrayRef({1}), /*keepdim=*/true);
  const at::Tensor units =
      X.div(at::maximum(lengths, lengths.amax(at::IntArrayRef({2}), true).mul(kLeastLength)));
  const at::Tensor products = gram(units);
  const at::Tensor plain = cholesky(products).sound.unsqueeze(1).unsqueeze(2);

  const at::Tensor damping = at::eye(X.size(1), X.options()).mul(kDamping);
  const at::Tensor columns = at::where(plain, units, units.add(damping));
  const at::Tensor damped_products =
      products.add(units.add(units.transpose(1, 2)), kDamping).add(damping, kDamping);
  const Cholesky first = cholesky(at::where(plain, products, damped_products));
  const at::Tensor nearly = divide(columns, first.factor);
  const Cholesky second = cholesky(gram(nearly));
  const at::Tensor Q = divide(nearly, second.factor);
  const at::Tensor sound = first.sound.logical_and(second.sound).logical_and(is_orthonormal(Q));
  return {Q.to(given.device()), sound.to(given.device())};
}

Orthonormalized householder_orthonormalize(const at::Tensor& X) {
  const auto [Q, R, sound] = judged_qr(X);
  return {Q, sound};
}

}  // namespace dykaf::aten
