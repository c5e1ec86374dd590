// The first basis of a factor, on any device.
#pragma once

#include <optional>

#include "aten/torch.h"

namespace dykaf::aten {

// Eigenvectors of the factor F [n, n] for the eigenvalues above the least one, descending. Those
// that equal it, to rounding, are the identity prior's: H's part of F lives in the range of
// `gradient` [n, rank], so that a Rayleigh-Ritz step in this range is exact. Nothing if a
// decomposition fails.
std::optional<at::Tensor> leading_eigenvectors(const at::Tensor& F, const at::Tensor& gradient);

// The orthogonal matrix [vectors | completion] by unit vectors, first those of rows in which all
// vectors are zero to rounding: weights without a gradient are then coordinates of their own, which
// no other's gradient moves. It is unique and, while those rows are the same, continuous in the
// vectors' span, where an eigensolver's own choice among equal eigenvalues hangs on rounding.
// Nothing if it does not come out orthogonal.
std::optional<at::Tensor> complete_basis(const at::Tensor& vectors);

struct SingularTriple {
  at::Tensor u;  // [m]
  at::Tensor v;  // [n]
  double sigma;
};

// The largest singular value of H [m, n] and its vectors; nothing if the decomposition fails.
std::optional<SingularTriple> top_singular_triple(const at::Tensor& H);

// The vector u [n, 1] of a factor u u^T; nothing if it has no unit length.
std::optional<at::Tensor> rank_one_vector(const at::Tensor& F);

}  // namespace dykaf::aten
