#include "aten/products.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

#include "aten/torch_compat.h"

// torch's own BLAS, where it lets others call it.
extern "C" {
void sgemm_(const char* transpose_a, const char* transpose_b, const int* m, const int* n,
            const int* k, const float* alpha, const float* a, const int* lda, const float* b,
            const int* ldb, const float* beta, float* c, const int* ldc) __attribute__((weak));
void dgemm_(const char* transpose_a, const char* transpose_b, const int* m, const int* n,
            const int* k, const double* alpha, const double* a, const int* lda, const double* b,
            const int* ldb, const double* beta, double* c, const int* ldc) __attribute__((weak));
}

namespace dykaf::aten {
namespace {

// The address of BLAS's routine for T; null where torch has none that can be called.
template <typename T>
auto blas_gemm() {
  if constexpr (std::is_same_v<T, float>) {
    return &sgemm_;
  } else {
    return &dgemm_;
  }
}

// An operand as BLAS reads it: column-major, or its transpose; or a batch of such.
struct Operand {
  explicit Operand(const at::Tensor& x)
      : is_row_major(x.stride(-1) == 1 || x.size(-1) == 1),
        leading(static_cast<int>(
            is_row_major ? (x.size(-2) > 1 ? std::max(x.stride(-2), x.size(-1)) : x.size(-1))
                         : (x.size(-1) > 1 ? std::max(x.stride(-1), x.size(-2)) : x.size(-2)))),
        to_next(x.dim() == 3 ? x.stride(0) : 0) {}

  static bool is_readable(const at::Tensor& x) {
    const int64_t rows = x.size(-2);
    const int64_t cols = x.size(-1);
    const bool row_major = (x.stride(-1) == 1 || cols == 1) && (rows == 1 || x.stride(-2) >= cols);
    const bool column_major =
        (x.stride(-2) == 1 || rows == 1) && (cols == 1 || x.stride(-1) >= rows);
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    return (row_major || column_major) && x.stride(-2) <= kMost && x.stride(-1) <= kMost &&
           rows <= kMost && cols <= kMost;
  }

  bool is_row_major;
  int leading;
  int64_t to_next;
};

// Row-major out = a b is column-major out^T = b^T a^T.
template <typename T>
void call_gemm(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  const Operand left(a);
  const Operand right(b);
  const int rows = static_cast<int>(out.size(-2));
  const int cols = static_cast<int>(out.size(-1));
  const int inner = static_cast<int>(a.size(-1));
  const int stride = static_cast<int>(std::max(out.stride(-2), out.size(-1)));
  const T one = 1;
  const T zero = 0;
  const char* transpose_left = left.is_row_major ? "N" : "T";
  const char* transpose_right = right.is_row_major ? "N" : "T";
  at::internal::lazy_init_num_threads();
  const T* a_data = a.const_data_ptr<T>();
  const T* b_data = b.const_data_ptr<T>();
  T* out_data = out.mutable_data_ptr<T>();
  const int64_t num = out.dim() == 3 ? out.size(0) : 1;
  const int64_t to_next = out.dim() == 3 ? out.stride(0) : 0;
  for (int64_t i = 0; i < num; ++i) {
    blas_gemm<T>()(transpose_right, transpose_left, &cols, &rows, &inner, &one,
                   b_data + i * right.to_next, &right.leading, a_data + i * left.to_next,
                   &left.leading, &zero, out_data + i * to_next, &stride);
  }
}

bool has_blas() { return &sgemm_ != nullptr && &dgemm_ != nullptr; }

}  // namespace

bool multiplies_bfloat16() {
  static const bool is_supported = cpu_multiplies_bfloat16();
  return is_supported;
}

// at::mm may round float32 by a setting of the whole process.
void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  if (has_blas() && out.stride(-1) == 1 && out.size(-2) <= std::numeric_limits<int>::max() &&
      Operand::is_readable(a) && Operand::is_readable(b)) {
    if (out.numel() == 0) return;
    if (out.scalar_type() == at::kFloat) {
      call_gemm<float>(out, a, b);
    } else {
      call_gemm<double>(out, a, b);
    }
    return;
  }
  if (out.scalar_type() == at::kFloat && cpu_operand_rounding() != OperandRounding::kNone) {
    out.copy_(at::matmul(a.to(at::kDouble), b.to(at::kDouble)));
  } else {
    out.copy_(at::matmul(a, b));
  }
}

MatmulPrecision torch_precision() {
  return cpu_operand_rounding() == OperandRounding::kBfloat16 ? MatmulPrecision::kMedium
                                                              : MatmulPrecision::kHighest;
}

at::Tensor full_product(const at::Tensor& a, const at::Tensor& b) {
  if (!a.device().is_cpu()) {
    const at::NoTF32Guard full_precision;
    return at::matmul(a, b);
  }
  std::vector<int64_t> shape = a.sizes().vec();
  shape.back() = b.size(-1);
  const at::Tensor out = at::empty(shape, a.options());
  multiply(out, a, b);
  return out;
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, MatmulPrecision precision) {
  const bool is_cpu = a.device().is_cpu();
  if (a.scalar_type() == at::kFloat && precision == MatmulPrecision::kMedium &&
      (!is_cpu || multiplies_bfloat16())) {
    return at::matmul(a.to(at::kBFloat16), b.to(at::kBFloat16)).to(at::kFloat);
  }
  if (precision == MatmulPrecision::kHigh && !is_cpu) return at::matmul(a, b);
  return full_product(a, b);
}

}  // namespace dykaf::aten
