#include "aten/first_basis.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>

#include <cmath>
#include <map>
#include <vector>

#include "aten/bounds.h"
#include "aten/decompositions.h"
#include "aten/products.h"
#include "aten/refresh_basis.h"

namespace dykaf::aten {

namespace {

constexpr int kFirstIterations = 2;

// [b, n, k]; of those of some matrices fewer count.
struct Leading {
  at::Tensor vectors;
  at::Tensor counts;  // int64 [b], on the CPU
  at::Tensor sound;   // bool [b]
};

// `least` [b, 1] is F's least eigenvalue. Where it is the only one of its kind all vectors count.
Leading distinct(const Eigen& eigen, const at::Tensor& vectors, const at::Tensor& least) {
  const int64_t n = vectors.size(1);
  const double share = rounding_share_of(eigen.values, n);
  const at::Tensor bound = least.add(eigen.values.narrow(1, 0, 1), share);
  const at::Tensor counts = eigen.values.gt(bound).sum(1).to(at::kCPU);
  return {vectors, at::where(counts.ge(n - 1), vectors.size(2), counts), eigen.sound};
}

Leading leading_eigenvectors(const at::Tensor& F, const at::Tensor& gradients) {
  const int64_t n = F.size(1);
  const int64_t rank = gradients.size(2);
  if (rank >= n) {
    const Eigen eigen = settled_eigenvectors(F);
    return distinct(eigen, eigen.vectors, eigen.values.narrow(1, n - 1, 1));
  }
  const JudgedQR range = settled_qr(gradients);
  const at::Tensor projected = full_product(range.Q.mT(), full_product(F, range.Q));
  Eigen inner = settled_eigenvectors(projected.add(projected.mT()).div_(2));
  inner.sound = inner.sound.logical_and(range.sound);
  const at::Tensor rest =
      F.diagonal(0, 1, 2).sum(1, /*keepdim=*/true).sub(inner.values.sum(1, /*keepdim=*/true));
  return distinct(inner, full_product(range.Q, inner.vectors), rest.div(n - rank));
}

// The orthogonal matrices [vectors | unit vectors].
FirstBasis complete_basis(const at::Tensor& vectors) {
  const int64_t num = vectors.size(0);
  const int64_t n = vectors.size(1);
  const int64_t rank = vectors.size(2);
  const at::Tensor yes = at::ones({num}, vectors.options().dtype(at::kBool));
  const at::Tensor identity = at::eye(n, vectors.options());
  if (rank == n) return {vectors, yes};
  if (rank == 0) return {identity.expand({num, -1, -1}), yes};
  // Sorting is stable: those that no vector has a part in, then the others.
  const at::Tensor is_shared = vectors.abs().amax(2).gt(rounding_share_of(vectors, n));
  const at::Tensor order = std::get<1>(
      at::sort(is_shared.to(at::kInt), /*stable=*/true, /*dim=*/1, /*descending=*/false));
  const at::Tensor units = identity.index_select(0, order.narrow(1, 0, n - rank).reshape({-1}))
                               .view({num, n - rank, n})
                               .mT();
  const JudgedQR basis = settled_qr(at::cat({vectors, units}, 2));
  return {basis.Q, basis.sound};
}

// Those with as many vectors go together.
FirstBasis completed(const Leading& leading) {
  std::map<int64_t, std::vector<int64_t>> places;
  const at::Tensor counts = leading.counts.contiguous();
  for (int64_t i = 0; i < counts.size(0); ++i) {
    places[counts.const_data_ptr<int64_t>()[i]].push_back(i);
  }
  const at::Tensor& vectors = leading.vectors;
  const int64_t n = vectors.size(1);
  const at::Tensor Q = at::empty({vectors.size(0), n, n}, vectors.options());
  const at::Tensor sound = leading.sound.clone();
  for (const auto& [count, list] : places) {
    const at::Tensor chosen = at::tensor(list).to(vectors.device());
    const FirstBasis basis = complete_basis(vectors.narrow(2, 0, count).index_select(0, chosen));
    Q.index_copy_(0, chosen, basis.Q);
    sound.index_copy_(0, chosen, basis.sound.logical_and(sound.index_select(0, chosen)));
  }
  return {Q, sound};
}

// Orthogonal iterations from the identity.
FirstBasis iterated_basis(at::Tensor F) {
  at::Tensor Q;
  at::Tensor sound;
  for (int i = 0; i < kFirstIterations; ++i) {
    const PowerIteration turn = power_iteration(F, cholesky_orthonormalize);
    F = turn.F;
    Q = i == 0 ? turn.P : full_product(Q, turn.P);
    sound = i == 0 ? turn.sound : sound.logical_and(turn.sound);
  }
  return {Q, sound};
}

}  // namespace

FirstBasis first_basis(const at::Tensor& F, const at::Tensor& gradients) {
  if (F.size(1) > kLongestWithEigenvectors) return iterated_basis(F);
  return completed(leading_eigenvectors(F, gradients));
}

FirstBasis rank_one_basis(const at::Tensor& F) {
  const at::Tensor largest = F.diagonal(0, 1, 2).argmax(1, /*keepdim=*/true).unsqueeze(2);
  const at::Tensor columns = F.gather(2, largest.expand({-1, F.size(1), 1}));
  const at::Tensor units = columns.div(columns.square().sum(1, /*keepdim=*/true).sqrt_());
  const at::Tensor counts = at::ones({F.size(0)}, at::kLong);
  return completed({units, counts, is_orthonormal(units)});
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

}  // namespace dykaf::aten
