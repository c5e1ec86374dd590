#include "cpu/linalg.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <utility>

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

namespace dykaf::cpu {
namespace {

// Panels below these heights run at a lower rate than what they save.
constexpr int64_t kPanel = 256;
constexpr int64_t kPanelOfOneThread = 128;
constexpr int64_t kTile = 32;
constexpr int64_t kFewColumns = 32;

// combine(lower, upper) gives the value for both places. Both tiles of a pair fit in cache, so that
// the strided side costs no more than the other. Threads own rows of the lower triangle.
template <typename T, typename Combine>
void mirror(T* x, int64_t n, const Combine& combine) {
  const int64_t num_tiles = (n + kTile - 1) / kTile;
  at::parallel_for(0, num_tiles, 4, [&](int64_t first, int64_t last) {
    for (int64_t row_begin = first * kTile; row_begin < std::min(n, last * kTile);
         row_begin += kTile) {
      for (int64_t col_begin = 0; col_begin <= row_begin; col_begin += kTile) {
        for (int64_t row = row_begin; row < std::min(n, row_begin + kTile); ++row) {
          for (int64_t col = col_begin; col < std::min(row, col_begin + kTile); ++col) {
            const T value = combine(x[row * n + col], x[col * n + row]);
            x[row * n + col] = value;
            x[col * n + row] = value;
          }
        }
      }
    }
  });
}

template <typename Combine>
void mirror(const at::Tensor& x, const Combine& combine) {
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "mirror",
                             [&] { mirror(x.mutable_data_ptr<scalar_t>(), x.size(0), combine); });
}

// Small products go in one piece, large ones in eight panels.
int64_t panel_height(int64_t n) {
  const bool is_alone = at::in_parallel_region() || at::get_num_threads() == 1;
  const int64_t least = is_alone ? kPanelOfOneThread : kPanel;
  return n < 2 * least ? n : std::max(least, (n + 7) / 8);
}

bool multiplies_bfloat16() {
  static const bool is_supported = aten::cpu_multiplies_bfloat16();
  return is_supported;
}

bool rounds(const at::Tensor& x, MatmulPrecision precision) {
  return precision == MatmulPrecision::kMedium && x.scalar_type() == at::kFloat &&
         multiplies_bfloat16();
}

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

// out = a b of operands of out's dtype, all of them used in full: at::mm may round float32 by a
// setting of the whole process.
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
  if (out.scalar_type() == at::kFloat &&
      aten::cpu_operand_rounding() != aten::OperandRounding::kNone) {
    out.copy_(a.to(at::kDouble).mm(b.to(at::kDouble)));
  } else {
    out.copy_(a.mm(b));
  }
}

// The operands of a product in bfloat16; nothing without memory for them.
std::optional<std::pair<at::Tensor, at::Tensor>> rounded(const at::Tensor& a, const at::Tensor& b) {
  try {
    return std::pair(a.to(at::kBFloat16), b.to(at::kBFloat16));
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

// out = a b of rounded operands; false without memory for the result.
bool multiply_rounded(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  try {
    out.copy_(a.mm(b));
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace

MatmulPrecision torch_precision() {
  return aten::cpu_operand_rounding() == aten::OperandRounding::kBfloat16
             ? MatmulPrecision::kMedium
             : MatmulPrecision::kHighest;
}

void product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
             MatmulPrecision precision, const at::Tensor& scratch) {
  const bool few_columns = b.size(1) <= kFewColumns && a.size(0) > kFewColumns;
  if (rounds(out, precision)) {
    if (const auto pair = rounded(a, b); pair && multiply_rounded(out, pair->first, pair->second)) {
      return;
    }
  }
  if (few_columns) {
    const at::Tensor transposed = scratch.view({out.size(1), out.size(0)});
    multiply(transposed, b.t(), a.t());
    out.copy_(transposed.t());
  } else {
    multiply(out, a, b);
  }
}

void symmetric_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                       MatmulPrecision precision) {
  const auto pair = rounds(out, precision) ? rounded(a, b) : std::nullopt;
  const int64_t n = out.size(0);
  const int64_t panel = panel_height(n);
  for (int64_t begin = 0; begin < n; begin += panel) {
    const int64_t end = std::min(n, begin + panel);
    const at::Tensor block = out.slice(0, begin, end).slice(1, 0, end);
    if (!pair ||
        !multiply_rounded(block, pair->first.slice(0, begin, end), pair->second.slice(1, 0, end))) {
      multiply(block, a.slice(0, begin, end), b.slice(1, 0, end));
    }
  }
  mirror(out, [](auto lower, auto) { return lower; });
}

at::Tensor full_product(const at::Tensor& a, const at::Tensor& b) {
  if (!a.device().is_cpu()) return at::matmul(a, b);  // under a guard of the caller's
  if (a.dim() == 2) {
    const at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
    multiply(out, a, b);
    return out;
  }
  const at::Tensor out = at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
  for (int64_t i = 0; i < a.size(0); ++i) multiply(out[i], a[i], b[i]);
  return out;
}

void triangular_symmetric_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  const int64_t n = out.size(0);
  const int64_t panel = panel_height(n);
  for (int64_t begin = 0; begin < n; begin += panel) {
    // Left of `begin` these rows of a are zero.
    const int64_t end = std::min(n, begin + panel);
    at::Tensor block = out.slice(0, begin, end).slice(1, begin, n);
    multiply(block, a.slice(0, begin, end).slice(1, begin, n),
             b.slice(0, begin, n).slice(1, begin, n));
  }
  mirror(out, [](auto, auto upper) { return upper; });
}

QR signed_qr(const at::Tensor& a) {
  auto [Q, R] = at::linalg_qr(a);
  const at::Tensor diagonal = R.diagonal(0, -2, -1);
  const at::Tensor signs =
      at::where(diagonal.lt(0), -at::ones_like(diagonal), at::ones_like(diagonal));
  return {Q.mul_(signs.unsqueeze(-2)), R.mul_(signs.unsqueeze(-1))};
}

at::Tensor is_orthonormal(const at::Tensor& Q) {
  // Rounding leaves some units times the root of n; TF32 or bfloat16 products leave 2^-11 and more.
  const double tolerance = Q.scalar_type() == at::kDouble ? 1e-10 : 1e-4;
  const int64_t k = Q.size(-1);
  const at::Tensor x = at::arange(k, Q.options()).remainder_(2).mul_(2).sub_(1);
  const at::Tensor Qx = Q.mul(x).sum(-1, /*keepdim=*/true);
  return Q.mul(Qx).sum(-2).sub_(x).abs_().amax(-1).le(tolerance);
}

std::optional<QR> checked_qr(const at::Tensor& a) {
  for (const auto dtype : {a.scalar_type(), at::kDouble}) {
    const QR qr = signed_qr(a.to(dtype));
    if (is_orthonormal(qr.Q).item<bool>()) {
      return QR{qr.Q.to(a.scalar_type()), qr.R.to(a.scalar_type())};
    }
  }
  return std::nullopt;
}

std::optional<Eigen> eigenvectors(const at::Tensor& a) {
  for (const auto dtype : {a.scalar_type(), at::kDouble}) {
    try {
      const auto [values, vectors] = at::linalg_eigh(a.to(dtype));
      if (at::isfinite(values).all().item<bool>() && is_orthonormal(vectors).item<bool>()) {
        return Eigen{values.flip(0).to(a.scalar_type()), vectors.flip(1).to(a.scalar_type())};
      }
    } catch (const c10::LinAlgError&) {
    }
  }
  return std::nullopt;
}

}  // namespace dykaf::cpu
