// Orthonormal columns of batches, with a verdict that no host waits for.
#pragma once

#include <ATen/core/Tensor.h>

namespace dykaf::aten {

struct Orthonormalized {
  at::Tensor Q;      // [b, n, n]
  at::Tensor sound;  // bool [b]; where false, Q is of no use
};

// The Q of X = Q T, T upper triangular with a positive diagonal, of each X [b, n, n].
using Orthonormalizer = Orthonormalized (*)(const at::Tensor& X);

// By CholeskyQR2 (Yamamoto et al. 2015) on columns of unit length: products are what a GPU is good
// at. X is a positive semidefinite matrix with its columns permuted like its rows. Where columns
// are dependent to half of the working precision, kDamping ||x_j|| e_j is added to column j, which
// keeps it near its own direction.
Orthonormalized cholesky_orthonormalize(const at::Tensor& X);

// By Householder's QR, on the CPU.
Orthonormalized householder_orthonormalize(const at::Tensor& X);

}  // namespace dykaf::aten
