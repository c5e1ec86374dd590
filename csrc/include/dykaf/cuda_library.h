// Products that a library computes instead of the kernels here, the rule which ones do, and cuBLAS.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "dykaf/types.h"

namespace dykaf::cuda {

using Stream = void*;  // a cudaStream_t

// Which operands of D = op(A) op(B) are read transposed, and whether D = D^T is known.
enum class GemmForm : int32_t { kNN, kTN, kNT, kSymmetricNT, kSymmetricTN };
inline constexpr int kNumForms = 5;

inline constexpr bool is_symmetric(GemmForm form) {
  return form == GemmForm::kSymmetricNT || form == GemmForm::kSymmetricTN;
}
inline constexpr bool transposes_a(GemmForm form) {
  return form == GemmForm::kTN || form == GemmForm::kSymmetricTN;
}
inline constexpr bool transposes_b(GemmForm form) {
  return form == GemmForm::kNT || form == GemmForm::kSymmetricNT;
}

// What a library may use beside operands and results: what NVIDIA recommends for compute capability
// 9, and more than the 4 MiB of others. With memory of its own that is no other stream's, cuBLAS
// chooses the same kernel in every run, and allocates nothing in the capture of a graph.
inline constexpr int64_t kLibraryWorkspaceBytes = int64_t{32} << 20;

// D_i = op(A_i) op(B_i) for matrices of one shape as BLAS has them, that is stored by columns;
// float32, alpha = 1, beta = 0. `column_major` makes it of matrices stored by rows.
struct BlasBatch {
  MatmulPrecision precision;  // of operands, at the least; not kHighest
  bool transpose_a;
  bool transpose_b;
  int32_t m;  // D is m x n, k is what is summed over
  int32_t n;
  int32_t k;
  int32_t lda;  // numbers from one column of A to the next
  int32_t ldb;
  int32_t ldd;
  int32_t count;
  const float* const* A;  // [count], on the device, of pointers to the device
  const float* const* B;
  float* const* D;
  const float* first_a;  // the first of each: of one product no array is read
  const float* first_b;
  float* first_d;
  void* workspace;  // [kLibraryWorkspaceBytes], on the device
};

// Sizes and operands of the row-major product D [m, n] = op(A) op(B) over k, as BLAS reads it. What
// is [r, c] by rows is its transpose, [c, r], by columns, c apart: so it is D^T = op(B)^T op(A)^T
// that is asked for. BLAS's A is B here, its m is n, and an operand that is transposed here is
// transposed there. Pointers are left to the caller.
BlasBatch column_major(GemmForm form, int32_t m, int32_t n, int32_t k);

// The products of one device.
class Library {
 public:
  virtual ~Library() = default;
  // Puts a batch on the stream; std::runtime_error with what the library said.
  virtual void multiply(const BlasBatch& batch, Stream stream) = 0;
};

// Sizes from `least` to `most` of one side of a product.
struct SizeRange {
  int64_t least;
  int64_t most;
  bool has(int64_t size) const { return least <= size && size <= most; }
  bool operator==(const SizeRange&) const = default;
};

// Says of the products that it fits whether the library computes them.
struct ProductRule {
  MatmulPrecision precision;
  GemmForm form;
  SizeRange m;
  SizeRange n;
  SizeRange k;
  bool by_library;
  bool operator==(const ProductRule&) const = default;
};

// How the products of a plan are computed.
struct Products {
  MatmulPrecision precision = MatmulPrecision::kHighest;
  Library* library = nullptr;           // outlives the plan; null: there is none
  std::vector<ProductRule> rules = {};  // the first that fits decides; without one the kernels

  // Not at kHighest, where three TF32 products beat a library's float32 ones, and not of symmetric
  // results, of which the kernels compute half.
  bool are_by_library(GemmForm form, int64_t m, int64_t n, int64_t k) const;

  bool operator==(const Products&) const = default;
};

// Finds a function of cuBLAS by its name in the C API; null: there is none.
using FindSymbol = void* (*)(const char* name);

// cuBLAS on the current device; null where it lacks a function. std::runtime_error where it cannot
// start. Threads may share it.
std::unique_ptr<Library> make_cublas(FindSymbol find);

}  // namespace dykaf::cuda
