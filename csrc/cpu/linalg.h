// Matrix products and decompositions of raw row-major arrays through ATen (BLAS and LAPACK).
#pragma once

#include <cstdint>
#include <optional>

#include "cpu/aten.h"

namespace dykaf::cpu {

// A [rows, cols] tensor over memory that it does not own.
template <typename T>
at::Tensor view(const T* data, int64_t rows, int64_t cols) {
  return at::from_blob(const_cast<T*>(data), {rows, cols}, c10::CppTypeToScalarType<T>::value);
}

// out = a b. BLAS is slow where b has a few columns alone; its transpose is multiplied then.
void product(at::Tensor out, const at::Tensor& a, const at::Tensor& b);

// out = a b for a product known to be symmetric; out [n, n], a [n, k], b [k, n]. Large ones are
// computed by row panels up to the diagonal alone. The upper triangle mirrors the lower exactly.
void symmetric_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

// out = a b for a product known to be symmetric with a upper triangular; all [n, n].
void triangular_symmetric_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

struct QR {
  at::Tensor Q;  // [..., n, n], or [..., n, k] for a tall reduced input
  at::Tensor R;  // upper triangular, diagonal >= 0
};

// Householder QR of one matrix or a batch, on any device, signs fixed so that R's diagonal is not
// negative.
QR signed_qr(const at::Tensor& a);

// Eigenvectors of symmetric a by descending eigenvalue, retried in float64; nothing if both fail.
std::optional<at::Tensor> eigenvectors(const at::Tensor& a);

}  // namespace dykaf::cpu
