// rank_one: V ~ scale^2 l r^T, followed by the rank-one projector-splitting integrator with the
// target beta2 V + (1 - beta2) G o G (Yudin et al., arXiv 2511.06477). factored: row and column
// means (Shazeer & Stern 2018, Adafactor).
#include "cpu/second_moment.h"

#include <cmath>

#include "cpu/linalg.h"
#include "cpu/loops.h"
#include "dykaf/bounds.h"

namespace dykaf::cpu {
namespace {

// y = (H o H) x, y [m], x [n].
template <typename T>
std::vector<double> squared_times(const T* H, int64_t m, int64_t n, const std::vector<double>& x) {
  std::vector<double> y(m);
  at::parallel_for(0, m, std::max<int64_t>(1, kGrain / n), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double h = H[i * n + j];
        sum += h * h * x[j];
      }
      y[i] = sum;
    }
  });
  return y;
}

// y = (H o H)^T x, y [n], x [m]. Threads own columns, so each sum runs over rows in order.
template <typename T>
std::vector<double> squared_transpose_times(const T* H, int64_t m, int64_t n,
                                            const std::vector<double>& x) {
  std::vector<double> y(n, 0.0);
  at::parallel_for(0, n, std::max<int64_t>(64, kGrain / m), [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = first; j < last; ++j) {
        const double h = H[i * n + j];
        y[j] += h * h * x[i];
      }
    }
  });
  return y;
}

double inner(const std::vector<double>& x, const std::vector<double>& y) {
  return dot(x.data(), y.data(), static_cast<int64_t>(x.size()));
}

double norm(const std::vector<double>& x) { return std::sqrt(inner(x, x)); }

// out = (decay out + gain increment) / divisor.
template <typename T>
void blend_(T* out, double decay, const std::vector<double>& increment, double gain,
            double divisor) {
  for (size_t i = 0; i < increment.size(); ++i) {
    out[i] = static_cast<T>((decay * out[i] + gain * increment[i]) / divisor);
  }
}

template <typename T>
RootFactors<T> roots(const std::vector<double>& row, const std::vector<double>& col) {
  RootFactors<T> root{std::vector<T>(row.size()), std::vector<T>(col.size())};
  for (size_t i = 0; i < row.size(); ++i) root.row[i] = static_cast<T>(std::sqrt(row[i]));
  for (size_t j = 0; j < col.size(); ++j) root.col[j] = static_cast<T>(std::sqrt(col[j]));
  return root;
}

template <typename T>
void rank_one_update_(const Problem<T>& p, double beta2, const T* H, double tau) {
  double& scale = *p.exp_avg_sq_scale;
  T* l = p.exp_avg_sq_row;
  T* r = p.exp_avg_sq_col;
  if (scale == 0) {
    std::fill_n(l, p.m, static_cast<T>(1 / std::sqrt(static_cast<double>(p.m))));
    std::fill_n(r, p.n, static_cast<T>(1 / std::sqrt(static_cast<double>(p.n))));
  }
  const double unit = std::max(tau, scale);
  const double a = beta2 * (scale / unit) * (scale / unit);
  const double b = (1 - beta2) * (tau / unit) * (tau / unit);

  const std::vector<double> K = squared_times(H, p.m, p.n, {r, r + p.n});
  const std::vector<double> old_l(l, l + p.m);
  std::vector<double> u = old_l;
  blend_(u.data(), a, K, b, 1);
  const double norm_K = norm(u);
  if (!(norm_K > 0)) return;
  for (double& value : u) value /= norm_K;

  std::vector<double> B(r, r + p.n);
  blend_(B.data(), a * inner(u, old_l), squared_transpose_times(H, p.m, p.n, u), b, 1);
  const double s = norm(B);
  if (!(s > 0)) return;
  std::copy(u.begin(), u.end(), l);
  blend_(r, 0, B, 1, s);
  scale = unit * std::sqrt(s);
}

}  // namespace

template <typename T>
RootFactors<T> compact_second_moment_(const Problem<T>& p, const Options& options, const T* H,
                                      T tau) {
  T* row = p.exp_avg_sq_row;
  T* col = p.exp_avg_sq_col;
  if (options.second_moment == SecondMoment::kRankOne) {
    rank_one_update_(p, options.beta2, H, static_cast<double>(tau));
    RootFactors<T> root = roots<T>({row, row + p.m}, {col, col + p.n});
    for (T& value : root.row) value *= static_cast<T>(*p.exp_avg_sq_scale);
    return root;
  }
  const double gain = (1 - options.beta2) * static_cast<double>(tau) * static_cast<double>(tau);
  const std::vector<double> ones_m(p.m, 1.0);
  const std::vector<double> ones_n(p.n, 1.0);
  blend_(row, options.beta2, squared_times(H, p.m, p.n, ones_n), gain / p.n, 1);
  blend_(col, options.beta2, squared_transpose_times(H, p.m, p.n, ones_m), gain / p.m, 1);
  const std::vector<double> rows(row, row + p.m);
  const double mean = inner(rows, ones_m) / static_cast<double>(p.m);
  RootFactors<T> root = roots<T>(rows, {col, col + p.n});
  const T inverse = mean > 0 ? static_cast<T>(1 / std::sqrt(mean)) : T(0);
  for (T& value : root.row) value *= inverse;
  return root;
}

namespace {

template <typename T>
T largest_magnitude(const T* x, int64_t size) {
  T largest = 0;
  for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::abs(x[i]));
  return largest;
}

// exp_avg = turned, and exp_avg_sq, permuted and scaled, at least exp_avg^2 / C.
template <typename T>
void move_full_(const Problem<T>& p, const Options& options, Side side, const int64_t* order,
                const T* growth, const T* turned, T noise, T* old_moment) {
  const bool left = side == Side::kLeft;
  const T floor = static_cast<T>(momentum_floor(options, static_cast<double>(*p.step)));
  std::copy_n(p.exp_avg_sq, p.size(), old_moment);
  at::parallel_for(0, p.m, std::max<int64_t>(1, kGrain / p.n), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* from = old_moment + (left ? order[i] : i) * p.n;
      T* exp_avg = p.exp_avg + i * p.n;
      T* exp_avg_sq = p.exp_avg_sq + i * p.n;
      for (int64_t j = 0; j < p.n; ++j) {
        const T momentum = turned[i * p.n + j];
        exp_avg[j] = std::abs(momentum) < noise ? T(0) : momentum;
        const T moved = left ? from[j] * growth[i] : from[order[j]] * growth[j];
        exp_avg_sq[j] = std::max(moved, exp_avg[j] * exp_avg[j] * floor);
      }
    }
  });
}

template <typename T>
void move_compact_(const Problem<T>& p, const Options& options, Side side, const int64_t* order,
                   const T* growth) {
  const bool left = side == Side::kLeft;
  const int64_t size = left ? p.m : p.n;
  T* vector = left ? p.exp_avg_sq_row : p.exp_avg_sq_col;
  std::vector<double> moved(size);
  double sum = 0;
  double old_sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    moved[i] = static_cast<double>(vector[order[i]]) * static_cast<double>(growth[i]);
    sum += moved[i];
    old_sum += static_cast<double>(vector[order[i]]);
  }
  double divisor = 1;
  if (options.second_moment == SecondMoment::kRankOne) {
    if (norm(moved) > 0) divisor = norm(moved);
    *p.exp_avg_sq_scale *= std::sqrt(divisor);
  } else if (old_sum > 0) {
    // Both means move alike, for the mean of the row vector divides row_i col_j.
    T* other = left ? p.exp_avg_sq_col : p.exp_avg_sq_row;
    const T ratio = static_cast<T>(sum / old_sum);
    for (int64_t i = 0; i < (left ? p.n : p.m); ++i) other[i] *= ratio;
  }
  blend_(vector, 0, moved, 1, divisor);
}

}  // namespace

template <typename T>
void move_moments_(const Problem<T>& p, const Options& options, Side side, const int64_t* order,
                   const T* growth, const T* turned, T* scratch) {
  const auto noise = static_cast<T>(static_cast<double>(largest_magnitude(p.exp_avg, p.size())) *
                                    rounding_share<T>(side == Side::kLeft ? p.m : p.n));
  if (p.exp_avg_sq != nullptr) {
    return move_full_(p, options, side, order, growth, turned, noise, scratch);
  }
  if (p.exp_avg_sq_row != nullptr) move_compact_(p, options, side, order, growth);
  for (int64_t i = 0; i < p.size(); ++i) {
    p.exp_avg[i] = std::abs(turned[i]) < noise ? T(0) : turned[i];
  }
}

template RootFactors<float> compact_second_moment_(const Problem<float>&, const Options&,
                                                   const float*, float);
template RootFactors<double> compact_second_moment_(const Problem<double>&, const Options&,
                                                    const double*, double);
template void move_moments_(const Problem<float>&, const Options&, Side, const int64_t*,
                            const float*, const float*, float*);
template void move_moments_(const Problem<double>&, const Options&, Side, const int64_t*,
                            const double*, const double*, double*);

}  // namespace dykaf::cpu
