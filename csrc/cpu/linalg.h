// Products of raw row-major arrays.
#pragma once

#include <cstdint>

#include "aten/torch.h"
#include "dykaf/types.h"

namespace dykaf::cpu {

// Up to this number of columns BLAS multiplies the transpose faster.
inline constexpr int64_t kFewColumns = 32;

// A [rows, cols] tensor over memory that it does not own.
template <typename T>
at::Tensor view(const T* data, int64_t rows, int64_t cols) {
  return at::from_blob(const_cast<T*>(data), {rows, cols}, c10::CppTypeToScalarType<T>::value);
}

// out = a b. BLAS is slow where b has a few columns alone; its transpose is multiplied then, into
// `scratch`, which has the size of out and is used for nothing else. Nothing is allocated at
// kHighest, and where memory for rounded operands is not to be had they are not rounded.
void product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
             MatmulPrecision precision, const at::Tensor& scratch);

// out = a b for a product known to be symmetric; out [n, n], a [n, k], b [k, n]. Large ones are
// computed by row panels up to the diagonal alone. The upper triangle mirrors the lower exactly.
void symmetric_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                       MatmulPrecision precision);

// out = a b for a product known to be symmetric with a upper triangular; all [n, n].
void triangular_symmetric_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

}  // namespace dykaf::cpu
