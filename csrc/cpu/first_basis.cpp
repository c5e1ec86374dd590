#include "cpu/first_basis.h"

#include "cpu/linalg.h"

namespace dykaf::cpu {

std::optional<at::Tensor> leading_eigenvectors(const at::Tensor& F, const at::Tensor& gradient) {
  if (gradient.size(1) >= F.size(0)) return eigenvectors(F);
  const at::Tensor range = signed_qr(gradient).Q;
  const at::Tensor projected = range.t().mm(F).mm(range);
  const std::optional<at::Tensor> inner = eigenvectors(projected.add(projected.t()).div_(2));
  if (!inner) return std::nullopt;
  return range.mm(*inner);
}

at::Tensor complete_basis(const at::Tensor& vectors) {
  const int64_t n = vectors.size(0);
  const int64_t rank = vectors.size(1);
  if (rank == n) return vectors;
  const at::Tensor units = at::eye(n, vectors.options()).slice(1, 0, n - rank);
  return signed_qr(at::cat({vectors, units}, 1)).Q;
}

std::optional<SingularTriple> top_singular_triple(const at::Tensor& H) {
  try {
    const auto [U, S, Vh] = at::linalg_svd(H, /*full_matrices=*/false);
    return SingularTriple{U.select(1, 0), Vh.select(0, 0), S[0].item<double>()};
  } catch (const c10::LinAlgError&) {
    return std::nullopt;
  }
}

at::Tensor rank_one_vector(const at::Tensor& F) {
  const at::Tensor column = F.select(1, F.diagonal().argmax().item<int64_t>());
  return column.div(column.norm()).unsqueeze(1);
}

}  // namespace dykaf::cpu
