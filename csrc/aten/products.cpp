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

// An operand as BLAS reads it: column-major, or its transpose.
struct Operand {
  explicit Operand(const at::Tensor& x)
      : is_row_major(x.stride(1) == 1 || x.size(1) == 1),
        leading(static_cast<int>(
            is_row_major ? (x.size(0) > 1 ? std::max(x.stride(0), x.size(1)) : x.size(1))
                         : (x.size(1) > 1 ? std::max(x.stride(1), x.size(0)) : x.size(0)))) {}

  static bool is_readable(const at::Tensor& x) {
    const bool row_major =
        (x.stride(1) == 1 || x.size(1) == 1) && (x.size(0) == 1 || x.stride(0) >= x.size(1));
    const bool column_major =
        (x.stride(0) == 1 || x.size(0) == 1) && (x.size(1) == 1 || x.stride(1) >= x.size(0));
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    return (row_major || column_major) && x.stride(0) <= kMost && x.stride(1) <= kMost &&
           x.size(0) <= kMost && x.size(1) <= kMost;
  }

  bool is_row_major;
  int leading;
};

// Row-major out = a b is column-major out^T = b^T a^T.
template <typename T>
void call_gemm(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  const Operand left(a);
  const Operand right(b);
  const int rows = static_cast<int>(out.size(0));
  const int cols = static_cast<int>(out.size(1));
  const int inner = static_cast<int>(a.size(1));
  const int stride = static_cast<int>(std::max(out.stride(0), out.size(1)));
  const T one = 1;
  const T zero = 0;
  const char* transpose_left = left.is_row_major ? "N" : "T";
  const char* transpose_right = right.is_row_major ? "N" : "T";
  at::internal::lazy_init_num_threads();
  blas_gemm<T>()(transpose_right, transpose_left, &cols, &rows, &inner, &one, b.const_data_ptr<T>(),
                 &right.leading, a.const_data_ptr<T>(), &left.leading, &zero,
                 out.mutable_data_ptr<T>(), &stride);
}

bool has_blas() { return &sgemm_ != nullptr && &dgemm_ != nullptr; }

}  // namespace

bool multiplies_bfloat16() {
  static const bool is_supported = cpu_multiplies_bfloat16();
  return is_supported;
}

// at::mm may round float32 by a setting of the whole process.
void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  if (has_blas() && out.stride(1) == 1 && out.size(0) <= std::numeric_limits<int>::max() &&
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
    out.copy_(a.to(at::kDouble).mm(b.to(at::kDouble)));
  } else {
    out.copy_(a.mm(b));
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
  if (a.dim() == 2) {
    const at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
    multiply(out, a, b);
    return out;
  }
  const at::Tensor out = at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
  for (int64_t i = 0; i < a.size(0); ++i) multiply(out[i], a[i], b[i]);
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
