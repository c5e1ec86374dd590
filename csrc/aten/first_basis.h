// The first bases of a batch of factors, on any device. They wait for it.
#pragma once

#include <optional>

#include "aten/torch.h"

namespace dykaf::aten {

struct FirstBasis {
  at::Tensor Q;      // [b, n, n]
  at::Tensor sound;  // bool [b]; where false, Q is of no use
};

// Sides longer than this start from a few orthogonal iterations instead of eigenvectors, whose
// decomposition takes the time of dozens of products (docs/cuda.md).
inline constexpr int64_t kLongestWithEigenvectors = 1024;

// Of factors F [b, n, n] after their first gradients [b, n, rank]: eigenvectors for the eigenvalues
// above the least one, descending, then unit vectors. The eigenvalues that equal the least, to
// rounding, are the identity prior's: H's part of F lives in the range of its gradient, so that a
// Rayleigh-Ritz step in this range is exact.
//
// Unit vectors of rows in which all vectors are zero to rounding come first: weights without a
// gradient are then coordinates of their own, which no other's gradient moves. The completion is
// unique and, while those rows are the same, continuous in the vectors' span, where an
// eigensolver's own choice among equal eigenvalues hangs on rounding.
FirstBasis first_basis(const at::Tensor& F, const at::Tensor& gradients);

// Of factors u u^T: u, then unit vectors.
FirstBasis rank_one_basis(const at::Tensor& F);

struct SingularTriple {
  at::Tensor u;  // [m]
  at::Tensor v;  // [n]
  double sigma;
};

// The largest singular value of H [m, n] and its vectors; nothing if the decomposition fails.
std::optional<SingularTriple> top_singular_triple(const at::Tensor& H);

}  // namespace dykaf::aten
