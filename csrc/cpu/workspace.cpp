// Scratch memory and the scaling of gradients.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/loops.h"
#include "cpu/matrix.h"

namespace dykaf::cpu {

template <typename T>
Workspace<T>::Workspace(std::span<const Problem<T>> problems) {
  int64_t size = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t skinny_size = 0;
  for (const Problem<T>& p : problems) {
    if (p.is_adamw()) continue;
    size = std::max(size, p.size());
    if (p.L != nullptr) rows = std::max(rows, p.m);
    if (p.R != nullptr) cols = std::max(cols, p.n);
    if (p.is_skinny()) {
      skinny_size = std::max(skinny_size, p.short_side() * (2 * p.skinny_rank + 1));
    }
  }
  // Each array starts on a cache line: BLAS's bits may hang on the alignment, and so would not be
  // the same for a matrix alone and beside a larger one.
  constexpr int64_t kLine = 64 / sizeof(T);
  const auto aligned = [](int64_t count) { return (count + kLine - 1) / kLine * kLine; };
  const int64_t left_size = aligned(rows * rows);
  const int64_t right_size = aligned(cols * cols);
  size = aligned(size);
  memory = at::empty({4 * size + left_size + right_size + skinny_size},
                     c10::CppTypeToScalarType<T>::value);
  gradient = memory.mutable_data_ptr<T>();
  product = gradient + size;
  update = product + size;
  turned = update + size;
  left = turned + size;
  right = left + left_size;
  skinny = right + right_size;
}

template <typename T>
T gradient_scale(const Problem<T>& p, const Options& options) {
  // Two powers of two short of the limits: tau and 1 / tau are normal, and 4 tau is finite.
  constexpr int kMaxExponent = std::numeric_limits<T>::max_exponent - 3;
  double largest = p.grad_max * std::abs(options.grad_scale);
  if (p.rho != nullptr) largest = std::max({largest, p.rho[0], p.rho[1]});
  if (!(largest > 0)) return T(1);
  int exponent = 0;
  const double fraction = std::frexp(largest, &exponent);  // largest = fraction 2^exponent
  if (fraction == 0.5) exponent -= 1;
  return std::ldexp(T(1), std::clamp(exponent, -kMaxExponent, kMaxExponent));
}

template <typename T>
void load_gradient(const Problem<T>& p, const Options& options, T tau, T* H) {
  const T scale = static_cast<T>(options.grad_scale / static_cast<double>(tau));
  visit_dtype(p.dtype, [&](auto* type) {
    const auto* grad = static_cast<const std::remove_pointer_t<decltype(type)>*>(p.grad);
    for_chunks(p.size(), [&](int64_t, int64_t begin, int64_t end) {
      load_scaled(grad + begin, scale, H + begin, end - begin);
    });
  });
}

template struct Workspace<float>;
template struct Workspace<double>;
template float gradient_scale(const Problem<float>&, const Options&);
template double gradient_scale(const Problem<double>&, const Options&);
template void load_gradient(const Problem<float>&, const Options&, float, float*);
template void load_gradient(const Problem<double>&, const Options&, double, double*);

}  // namespace dykaf::cpu
