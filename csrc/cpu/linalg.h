// Matrix products and decompositions of raw row-major arrays (BLAS and LAPACK).
#pragma once

#include <cstdint>
#include <optional>

#include "cpu/aten.h"
#include "dykaf/bounds.h"
#include "dykaf/types.h"

namespace dykaf::cpu {

// A [rows, cols] tensor over memory that it does not own.
template <typename T>
at::Tensor view(const T* data, int64_t rows, int64_t cols) {
  return at::from_blob(const_cast<T*>(data), {rows, cols}, c10::CppTypeToScalarType<T>::value);
}

// Of a product's operands, by torch's setting for products on the CPU.
MatmulPrecision torch_precision();

// out = a b. BLAS is slow where b has a few columns alone; its transpose is multiplied then, into
// `scratch`, which has the size of out and is used for nothing else. Nothing is allocated at
// kHighest, and where memory for rounded operands is not to be had they are not rounded.
void product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
             MatmulPrecision precision, const at::Tensor& scratch);

// out = a b for a product known to be symmetric; out [n, n], a [n, k], b [k, n]. Large ones are
// computed by row panels up to the diagonal alone. The upper triangle mirrors the lower exactly.
void symmetric_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                       MatmulPrecision precision);

// a b in full precision, of matrices or batches of them on any device, whatever torch's settings.
at::Tensor full_product(const at::Tensor& a, const at::Tensor& b);

// out = a b for a product known to be symmetric with a upper triangular; all [n, n].
void triangular_symmetric_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

struct QR {
  at::Tensor Q;  // [..., n, n], or [..., n, k] for a tall reduced input
  at::Tensor R;  // upper triangular, diagonal >= 0
};

// Householder QR of one matrix or a batch, on any device, signs fixed so that R's diagonal is not
// negative.
QR signed_qr(const at::Tensor& a);

// Whether the columns of each Q [..., n, k] are orthonormal, as a tensor of bools that no host has
// waited for: ||Q^T Q x - x||_max for x of alternating signs, without a matrix product, so that
// whatever rounds those is seen too. NaN and infinity are not orthonormal.
at::Tensor is_orthonormal(const at::Tensor& Q);

// rounding_share (dykaf/bounds.h) in the dtype of x.
inline double rounding_share_of(const at::Tensor& x, int64_t side) {
  return x.scalar_type() == at::kDouble ? rounding_share<double>(side)
                                        : rounding_share<float>(side);
}

// signed_qr of one matrix, tried again in float64 if Q is not orthonormal; nothing if that fails.
std::optional<QR> checked_qr(const at::Tensor& a);

struct Eigen {
  at::Tensor values;   // descending
  at::Tensor vectors;  // columns
};

// Of symmetric a, tried again in float64 if the vectors are not orthonormal; nothing if both fail.
std::optional<Eigen> eigenvectors(const at::Tensor& a);

}  // namespace dykaf::cpu
