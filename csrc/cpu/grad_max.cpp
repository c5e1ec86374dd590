// max|G| of each gradient, NaN where an entry is not finite.
#include <bit>
#include <cmath>
#include <limits>

#include "cpu/loops.h"
#include "dykaf/ops.h"

namespace dykaf::cpu {
namespace {

template <typename In>
using Bits = std::conditional_t<sizeof(In) == 8, int64_t,
                                std::conditional_t<sizeof(In) == 4, int32_t, int16_t>>;

// Without their sign, the bits of floating-point numbers order as integers as the numbers do, with
// infinity and NaN last; and the compiler uses vectors for a maximum of integers.
template <typename In>
DYKAF_WIDE double range_max(const In* in, int64_t begin, int64_t end) {
  using Integer = Bits<In>;
  Integer largest = 0;
  for (int64_t i = begin; i < end; ++i) {
    const auto magnitude =
        static_cast<Integer>(std::bit_cast<Integer>(in[i]) & std::numeric_limits<Integer>::max());
    largest = magnitude > largest ? magnitude : largest;
  }
  const auto value = static_cast<double>(std::bit_cast<In>(largest));
  return std::isfinite(value) ? value : std::numeric_limits<double>::quiet_NaN();
}

template <typename In>
double array_max(const In* in, int64_t size) {
  std::vector<double> partials((size + kChunk - 1) / kChunk);
  for_chunks(size, [&](int64_t chunk, int64_t begin, int64_t end) {
    partials[chunk] = range_max(in, begin, end);
  });
  double largest = 0;
  for (double partial : partials) {
    if (std::isnan(partial)) return partial;
    largest = std::max(largest, partial);
  }
  return largest;
}

}  // namespace

void grad_max(std::span<const Gradient> gradients, double* maxima) {
  for (const Gradient& gradient : gradients) {
    visit_dtype(gradient.dtype, [&](auto* type) {
      using In = std::remove_pointer_t<decltype(type)>;
      *maxima = array_max(static_cast<const In*>(gradient.data), gradient.size);
    });
    ++maxima;
  }
}

}  // namespace dykaf::cpu
