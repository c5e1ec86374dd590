#include "aten/first_basis.h"

#include <cmath>

#include "aten/bounds.h"
#include "aten/decompositions.h"
#include "aten/products.h"

namespace dykaf::aten {

namespace {

// V's columns whose eigenvalues are not the least one to rounding: of those among which that is the
// only one, all. `least` is F's.
at::Tensor distinct(const Eigen& eigen, const at::Tensor& least, int64_t n) {
  const double share = rounding_share_of(eigen.values, n);
  const at::Tensor bound = least.add(eigen.values[0], share);
  const auto count = eigen.values.gt(bound).sum().item<int64_t>();
  return count >= n - 1 ? eigen.vectors : eigen.vectors.narrow(1, 0, count);
}

}  // namespace

std::optional<at::Tensor> leading_eigenvectors(const at::Tensor& F, const at::Tensor& gradient) {
  const int64_t n = F.size(0);
  const int64_t rank = gradient.size(1);
  if (rank >= n) {
    const std::optional<Eigen> eigen = eigenvectors(F);
    if (!eigen) return std::nullopt;
    return distinct(*eigen, eigen->values[n - 1], n);
  }
  const std::optional<QR> range = checked_qr(gradient);
  if (!range) return std::nullopt;
  const at::Tensor projected = full_product(range->Q.t(), full_product(F, range->Q));
  const std::optional<Eigen> inner = eigenvectors(projected.add(projected.t()).div_(2));
  if (!inner) return std::nullopt;
  const at::Tensor least = F.trace().sub(inner->values.sum()).div_(n - rank);
  return full_product(range->Q, distinct(*inner, least, n));
}

std::optional<at::Tensor> complete_basis(const at::Tensor& vectors) {
  const int64_t n = vectors.size(0);
  const int64_t rank = vectors.size(1);
  if (rank == n) return vectors;
  if (rank == 0) return at::eye(n, vectors.options());
  // Sorting is stable: those that no vector has a part in, then the others.
  const double share = rounding_share_of(vectors, n);
  const at::Tensor is_shared = vectors.abs().amax(1).gt(share);
  const at::Tensor order = std::get<1>(
      at::sort(is_shared.to(at::kInt), /*stable=*/true, /*dim=*/0, /*descending=*/false));
  const at::Tensor units =
      at::eye(n, vectors.options()).index_select(1, order.slice(0, 0, n - rank));
  const std::optional<QR> basis = checked_qr(at::cat({vectors, units}, 1));
  if (!basis) return std::nullopt;
  return basis->Q;
}

std::optional<SingularTriple> top_singular_triple(const at::Tensor& H) {
  for (const auto dtype : {H.scalar_type(), at::kDouble}) {
    try {
      const auto [U, S, Vh] = at::linalg_svd(decomposable(H).to(dtype), /*full_matrices=*/false);
      const at::Tensor u = U.narrow(1, 0, 1);
      const at::Tensor v = Vh.narrow(0, 0, 1).t();
      const auto sigma = S[0].item<double>();
      if (std::isfinite(sigma) && is_orthonormal(u).item<bool>() &&
          is_orthonormal(v).item<bool>()) {
        return SingularTriple{u.squeeze(1).to(H.options()), v.squeeze(1).to(H.options()), sigma};
      }
    } catch (const c10::LinAlgError&) {
    }
  }
  return std::nullopt;
}

std::optional<at::Tensor> rank_one_vector(const at::Tensor& F) {
  const at::Tensor column = F.select(1, F.diagonal().argmax().item<int64_t>());
  const at::Tensor unit = column.div(column.norm()).unsqueeze(1);
  if (!is_orthonormal(unit).item<bool>()) return std::nullopt;
  return unit;
}

}  // namespace dykaf::aten
