#include "cpu/linalg.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "aten/products.h"

namespace dykaf::cpu {
namespace {

// Panels below these heights run at a lower rate than what they save.
constexpr int64_t kPanel = 256;
constexpr int64_t kPanelOfOneThread = 128;
constexpr int64_t kTile = 32;

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

bool rounds(const at::Tensor& x, MatmulPrecision precision) {
  return precision == MatmulPrecision::kMedium && x.scalar_type() == at::kFloat &&
         aten::multiplies_bfloat16();
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
    aten::multiply(transposed, b.t(), a.t());
    out.copy_(transposed.t());
  } else {
    aten::multiply(out, a, b);
  }
}

void symmetric_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                       MatmulPrecision precision) {
  const auto pair = rounds(out, precision) ? rounded(a, b) : std::nullopt;
  const int64_t n = out.size(0);
  const int64_t panel = panel_height(n);
  // Views cost more than small products.
  const auto part = [&](const at::Tensor& x, int64_t dim, int64_t begin, int64_t end) {
    return end - begin == x.size(dim) ? x : x.slice(dim, begin, end);
  };
  for (int64_t begin = 0; begin < n; begin += panel) {
    const int64_t end = std::min(n, begin + panel);
    const at::Tensor block = part(part(out, 0, begin, end), 1, 0, end);
    if (!pair ||
        !multiply_rounded(block, part(pair->first, 0, begin, end), part(pair->second, 1, 0, end))) {
      aten::multiply(block, part(a, 0, begin, end), part(b, 1, 0, end));
    }
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
    aten::multiply(block, a.slice(0, begin, end).slice(1, begin, n),
                   b.slice(0, begin, n).slice(1, begin, n));
  }
  mirror(out, [](auto, auto upper) { return upper; });
}

}  // namespace dykaf::cpu
