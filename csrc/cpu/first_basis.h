// The first basis of a factor, on any device.
#pragma once

#include <optional>

#include "cpu/aten.h"

namespace dykaf::cpu {

// Eigenvectors of the `rank` largest eigenvalues of the factor F [n, n], descending. All others are
// equal, the identity prior's: H's part of F lives in the range of `gradient` [n, rank], so that a
// Rayleigh-Ritz step in this range is exact. Nothing if the eigensolver fails.
std::optional<at::Tensor> leading_eigenvectors(const at::Tensor& F, const at::Tensor& gradient);

// The orthogonal matrix [vectors | completion] by unit vectors: unique and continuous in the
// vectors' span, where an eigensolver's own choice among equal eigenvalues hangs on rounding.
at::Tensor complete_basis(const at::Tensor& vectors);

struct SingularTriple {
  at::Tensor u;  // [m]
  at::Tensor v;  // [n]
  double sigma;
};

// The largest singular value of H [m, n] and its vectors; nothing if the decomposition fails.
std::optional<SingularTriple> top_singular_triple(const at::Tensor& H);

// The vector u of a factor u u^T.
at::Tensor rank_one_vector(const at::Tensor& F);

}  // namespace dykaf::cpu
