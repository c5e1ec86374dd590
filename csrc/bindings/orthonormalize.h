// Orthonormal columns by matrix products and Cholesky decompositions, without waiting for a device.
#pragma once

#include <ATen/core/Tensor.h>

namespace dykaf::bindings {

struct Orthonormalized {
  at::Tensor Q;      // [b, n, n]
  at::Tensor sound;  // bool [b]; where false, Q is of no use
};

// The Q of X = Q T, T upper triangular with a positive diagonal, of each X [b, n, n], by
// CholeskyQR2 (Yamamoto et al. 2015) on columns of unit length. X is a positive semidefinite matrix
// with its columns permuted like its rows. Where columns are dependent to half of the working
// precision, kDamping ||x_j|| e_j is added to column j, which keeps it near its own direction.
Orthonormalized orthonormalize(const at::Tensor& X);

}  // namespace dykaf::bindings
