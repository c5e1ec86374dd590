// Adam in the basis: one pass over exp_avg, the second moment and the update.
#include <cmath>

#include "cpu/adam.h"
#include "cpu/each_matrix.h"
#include "cpu/loops.h"
#include "cpu/matrix.h"
#include "cpu/second_moment.h"
#include "dykaf/ops.h"

namespace dykaf::cpu {
namespace {

template <typename T>
double full_update_(const Problem<T>& p, const AdamScalars<T>& s, const T* H, T* update) {
  return sum_chunks<1>(p.size(), [&](int64_t begin, int64_t end) {
    adam_range_(p.exp_avg + begin, p.exp_avg_sq + begin, H + begin, update + begin, end - begin, s);
    return std::array{dot(update + begin, update + begin, end - begin)};
  })[0];
}

template <typename T>
double compact_update_(const Problem<T>& p, const Options& options, const AdamScalars<T>& s,
                       const T* H, T* update) {
  const RootFactors<T> root = compact_second_moment_(p, options, H, s.tau);
  std::vector<double> row_sums(p.m);
  at::parallel_for(0, p.m, std::max<int64_t>(1, kGrain / p.n), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T row = root.row[i] * s.correction2;
      const int64_t begin = i * p.n;
      for (int64_t j = 0; j < p.n; ++j) {
        T& exp_avg = p.exp_avg[begin + j];
        const T g = gradient_of(H[begin + j], s);
        exp_avg = blend_momentum(exp_avg, g, s);
        // Row and column means can be far below an entry's own second moment.
        const T ratio = (exp_avg * s.of_momentum + g * s.of_gradient) / (row * root.col[j] + s.eps);
        update[begin + j] = std::clamp(ratio, -s.bound, s.bound);
      }
      row_sums[i] = dot(update + begin, update + begin, p.n);
    }
  });
  double total = 0;
  for (double sum : row_sums) total += sum;
  return total;
}

// Without a second moment.
template <typename T>
double momentum_update_(const Problem<T>& p, const AdamScalars<T>& s, const T* H, T* update) {
  return sum_chunks<1>(p.size(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T g = gradient_of(H[i], s);
      p.exp_avg[i] = blend_momentum(p.exp_avg[i], g, s);
      update[i] = p.exp_avg[i] * s.of_momentum + g * s.of_gradient;
    }
    return std::array{dot(update + begin, update + begin, end - begin)};
  })[0];
}

template <typename T>
void set_update_rms(const Problem<T>& p, double sum_of_squares) {
  *p.update_rms = static_cast<float>(std::sqrt(sum_of_squares / static_cast<double>(p.size())));
}

}  // namespace

template <typename T>
void adam_update_(const Problem<T>& p, const Options& options, const T* H, T tau, T* update) {
  *p.step += 1;
  const AdamScalars<T> s(p, options, tau);
  if (p.exp_avg_sq != nullptr) return set_update_rms(p, full_update_(p, s, H, update));
  const bool is_compact = p.exp_avg_sq_row != nullptr;
  set_update_rms(p, is_compact ? compact_update_(p, options, s, H, update)
                               : momentum_update_(p, s, H, update));
}

template <typename T>
void adamw_(const Problem<T>& p, const Options& options) {
  *p.step += 1;
  const AdamScalars<T> s(options, *p.step);
  const T scale = static_cast<T>(options.grad_scale);
  const double sum = sum_chunks<1>(p.size(), [&](int64_t begin, int64_t end) {
    T update[kChunk];
    visit_dtype(p.dtype, [&](auto* type) {
      const auto* grad = static_cast<const std::remove_pointer_t<decltype(type)>*>(p.grad);
      load_scaled(grad + begin, scale, update, end - begin);
    });
    adam_range_(p.exp_avg + begin, p.exp_avg_sq + begin, update, update, end - begin, s);
    apply_range_(p, options, update, begin, end);
    return std::array{dot(update, update, end - begin)};
  })[0];
  set_update_rms(p, sum);
}

template <typename T>
void adam_update_(std::span<const Problem<T>> problems, const Options& options, T* const* updates) {
  for_each_matrix(problems, [&](size_t i) {
    // The update serves as H, which Adam reads before it writes.
    const T tau = gradient_scale(problems[i], options);
    load_gradient(problems[i], options, tau, updates[i]);
    adam_update_(problems[i], options, updates[i], tau, updates[i]);
  });
}

template void adam_update_(const Problem<float>&, const Options&, const float*, float, float*);
template void adam_update_(const Problem<double>&, const Options&, const double*, double, double*);
template void adamw_(const Problem<float>&, const Options&);
template void adamw_(const Problem<double>&, const Options&);
template void adam_update_(std::span<const Problem<float>>, const Options&, float* const*);
template void adam_update_(std::span<const Problem<double>>, const Options&, double* const*);

}  // namespace dykaf::cpu
