// max|G| of each gradient, NaN where an entry is not finite.
#include <cmath>
#include <limits>

#include "cpu/loops.h"
#include "dykaf/ops.h"

namespace dykaf::cpu {
namespace {

// Comparisons drop NaN, but NaN and infinity alone have x - x != 0: the flag catches both.
template <typename T, typename In>
double range_max(const In* in, int64_t begin, int64_t end) {
  T largest = 0;
  bool finite = true;
  for (int64_t i = begin; i < end; ++i) {
    const T value = static_cast<T>(in[i]);
    const T magnitude = std::abs(value);
    largest = magnitude > largest ? magnitude : largest;
    finite &= value - value == T(0);
  }
  return finite ? static_cast<double>(largest) : std::numeric_limits<double>::quiet_NaN();
}

template <typename T, typename In>
double array_max(const In* in, int64_t size) {
  std::vector<double> partials((size + kChunk - 1) / kChunk);
  for_chunks(size, [&](int64_t chunk, int64_t begin, int64_t end) {
    partials[chunk] = range_max<T>(in, begin, end);
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
      using T = std::conditional_t<std::is_same_v<In, double>, double, float>;
      *maxima = array_max<T>(static_cast<const In*>(gradient.data), gradient.size);
    });
    ++maxima;
  }
}

}  // namespace dykaf::cpu
