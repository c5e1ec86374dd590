// Gradients' rows made part of an orthonormal basis.
#pragma once

#include "aten/torch.h"

namespace dykaf::aten {

// Orthonormal rows, last X.
struct OrthonormalRows {
  at::Tensor X;      // [b, k, l]
  at::Tensor last;   // [b, k, k]
  at::Tensor sound;  // bool [b]; where false the others are of no use
};

// Of any rows [b, k, l], in products and decompositions of small matrices alone, whatever the
// number of matrices: row i is a positive multiple of what the given row i has outside of those
// before it. What is a combination of those before it, to rounding, leaves a row of zeros.
//
// A pass is S = D X X^T D + shift I = K K^T, X <- K^-1 D X, with the inverse lengths D (shifted
// CholeskyQR, Fukaya et al. 2020). The shift, more than the rounding of S, keeps S definite; what a
// dependent row has of its own grows by its inverse in each pass, so that three bring it from
// rounding to order one. The last pass has no shift: a row that has less of its own then than
// kLeastOwn is combination and rounding.
OrthonormalRows orthonormal_rows(const at::Tensor& rows);

}  // namespace dykaf::aten
