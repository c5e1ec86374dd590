#include "cpu/linalg.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/Utils.h>

#include <algorithm>

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
  static const bool is_supported = [] {
    const auto capabilities = at::cpu::get_cpu_capabilities();
    const auto found = capabilities.find("avx512_bf16");
    return found != capabilities.end() && found->second.isBool() && found->second.toBool();
  }();
  return is_supported;
}

// How the factors of a product are read. At precision "medium" oneDNN may round float32 to bfloat16
// by itself, but does not on CPUs that have only AVX-512 instructions for it.
at::Tensor operand(const at::Tensor& x) {
  const bool rounds =
      x.scalar_type() == at::kFloat && multiplies_bfloat16() &&
      at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL) ==
          at::Float32Precision::BF16;
  return rounds ? x.to(at::kBFloat16) : x;
}

// out = a b of operands.
void multiply(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() == out.scalar_type()) {
    at::mm_out(out, a, b);
  } else {
    out.copy_(a.mm(b));
  }
}

}  // namespace

void product(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
  if (b.size(1) <= kFewColumns && a.size(0) > kFewColumns) {
    out.copy_(operand(b.t().contiguous()).mm(operand(a.t())).t());
  } else {
    multiply(out, operand(a), operand(b));
  }
}

void symmetric_product(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right) {
  const at::Tensor a = operand(left);
  const at::Tensor b = operand(right);
  const int64_t n = out.size(0);
  const int64_t panel = panel_height(n);
  for (int64_t begin = 0; begin < n; begin += panel) {
    const int64_t end = std::min(n, begin + panel);
    multiply(out.slice(0, begin, end).slice(1, 0, end), a.slice(0, begin, end), b.slice(1, 0, end));
  }
  mirror(out, [](auto lower, auto) { return lower; });
}

void triangular_symmetric_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  const int64_t n = out.size(0);
  const int64_t panel = panel_height(n);
  for (int64_t begin = 0; begin < n; begin += panel) {
    // Left of `begin` these rows of a are zero.
    const int64_t end = std::min(n, begin + panel);
    at::Tensor block = out.slice(0, begin, end).slice(1, begin, n);
    at::mm_out(block, a.slice(0, begin, end).slice(1, begin, n),
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

std::optional<at::Tensor> eigenvectors(const at::Tensor& a) {
  for (const auto dtype : {a.scalar_type(), at::kDouble}) {
    try {
      const at::Tensor vectors = std::get<1>(at::linalg_eigh(a.to(dtype)));
      return vectors.flip(1).to(a.scalar_type());
    } catch (const c10::LinAlgError&) {
    }
  }
  return std::nullopt;
}

}  // namespace dykaf::cpu
