// Matrices with optimizer state as the operations take them, and their references.
#pragma once

#include <limits>

#include "dykaf/rounding.h"
#include "kernel_check.h"
#include "reference_skinny.h"

namespace kernel_check {

using namespace dykaf;

// Those with factors; kVector: what is no matrix.
enum class Sides { kBoth, kLeft, kRight, kNone, kVector };
enum class Master { kNo, kYes };

struct CaseSpec {
  int64_t m, n;
  Sides sides = Sides::kBoth;
  DType dtype = DType::kFloat32;
  Master master = Master::kNo;
  int64_t offset = 0;       // of the arrays in their allocations, in elements
  double size = 1;          // of the gradient and rho
  int64_t skinny_rank = 0;  // with the short one of the sides

  int64_t short_side() const { return std::min(m, n); }
  int64_t long_side() const { return std::max(m, n); }
};

inline Options default_options() {
  Options o{};
  o.beta1 = 0.9;
  o.beta2 = 0.95;
  o.eps = 0.02;  // large, so that its place shows
  o.factor_beta = 0.9;
  o.grad_scale = 1;
  o.seed = 11;
  return o;
}

// An array in a parameter's dtype.
struct TypedArray {
  DType dtype = DType::kFloat32;
  Array<float> floats;
  Array<uint16_t> bits;

  TypedArray() = default;
  TypedArray(int64_t size, DType dtype, int64_t offset) : dtype(dtype) {
    if (dtype == DType::kFloat32) {
      floats = Array<float>(size, offset);
    } else {
      bits = Array<uint16_t>(size, offset);
    }
  }
  void* get() const {
    return dtype == DType::kFloat32 ? static_cast<void*>(floats.get()) : bits.get();
  }
  int64_t num_bytes() const { return 4 * floats.size() + 2 * bits.size(); }
  void set(int64_t i, float x) const {
    if (dtype == DType::kFloat32) floats[i] = x;
    if (dtype == DType::kBFloat16) bits[i] = nearest_bfloat16(x);
    if (dtype == DType::kFloat16) bits[i] = nearest_float16(x);
  }
  float operator[](int64_t i) const {
    if (dtype == DType::kFloat32) return floats[i];
    return dtype == DType::kBFloat16 ? bfloat16_to_float(bits[i]) : float16_to_float(bits[i]);
  }
};

inline uint16_t rounded_stochastically(float x, DType dtype, uint32_t random) {
  return dtype == DType::kBFloat16 ? round_to_bfloat16(x, random)
                                   : nearest_float16(round_to_float16(x, random));
}

// Symmetric, positive definite, of unit norm, no entry zero.
inline Array<float> random_factor(int64_t n, Rng& rng, int64_t offset) {
  std::uniform_real_distribution<double> uniform(0.2, 1);
  std::vector<double> F(static_cast<size_t>(n * n));
  std::vector<double> v(static_cast<size_t>(n));
  for (double& entry : v) entry = uniform(rng);
  double squares = 0;
  for (int64_t i = 0; i < n * n; ++i) {
    const size_t row = static_cast<size_t>(i / n);
    const size_t col = static_cast<size_t>(i % n);
    F[static_cast<size_t>(i)] = 0.3 * v[row] * v[col] + (row == col ? uniform(rng) : 0);
    squares += F[static_cast<size_t>(i)] * F[static_cast<size_t>(i)];
  }
  Array<float> factor(n * n, offset);
  for (int64_t i = 0; i < n * n; ++i) {
    factor[i] = static_cast<float>(F[static_cast<size_t>(i)] / std::sqrt(squares));
  }
  return factor;
}

// Orthogonal and not symmetric: the product of two reflections.
inline Array<float> random_basis(int64_t n, Rng& rng, int64_t offset) {
  std::normal_distribution<double> normal;
  std::vector<double> Q(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) Q[static_cast<size_t>(i * n + i)] = 1;
  for (int reflection = 0; reflection < 2; ++reflection) {
    std::vector<double> v(static_cast<size_t>(n));
    double squares = 0;
    for (double& entry : v) {
      entry = normal(rng);
      squares += entry * entry;
    }
    for (int64_t i = 0; i < n; ++i) {
      double* row = Q.data() + i * n;
      double along = 0;
      for (int64_t j = 0; j < n; ++j) along += row[j] * v[static_cast<size_t>(j)];
      for (int64_t j = 0; j < n; ++j) row[j] -= 2 * along / squares * v[static_cast<size_t>(j)];
    }
  }
  Array<float> basis(n * n, offset);
  for (int64_t i = 0; i < n * n; ++i) basis[i] = static_cast<float>(Q[static_cast<size_t>(i)]);
  return basis;
}

// The first rows of an orthogonal matrix, then random ones, then NaN, which nobody may read.
inline Array<float> random_rows(int64_t inner, int64_t used, int64_t size, int64_t l, Rng& rng,
                                int64_t offset) {
  const Array<float> orthogonal = random_basis(l, rng, 0);
  const Array<float> more = randn((used - inner) * l, rng);
  Array<float> rows(size * l, offset);
  std::copy_n(orthogonal.get(), inner * l, rows.get());
  std::copy_n(more.get(), more.size(), rows.get() + inner * l);
  return rows;
}

inline Array<float> random_positive(int64_t n, Rng& rng, int64_t offset = 0) {
  std::uniform_real_distribution<float> uniform(0.1f, 1);
  Array<float> x(n, offset);
  for (int64_t i = 0; i < n; ++i) x[i] = uniform(rng);
  return x;
}

inline Dense dense(const Array<float>& x, int64_t m, int64_t n) {
  if (x.size() == 0) return {};
  Dense A(m, n);
  for (int64_t i = 0; i < m * n; ++i) A.x[static_cast<size_t>(i)] = double{x[i]};
  return A;
}

inline Dense dense(const TypedArray& x, int64_t m, int64_t n) {
  Dense A(m, n);
  for (int64_t i = 0; i < m * n; ++i) A.x[static_cast<size_t>(i)] = double{x[i]};
  return A;
}

// One matrix in the middle of training.
struct MatrixCase {
  CaseSpec spec;
  TypedArray grad, param;
  Array<float> master, exp_avg, exp_avg_sq, row, col, L, R, Q_L, Q_R, step, update_rms;
  Array<float> basis, core, flat;
  Array<int64_t> rows;
  Array<double> scale, rho;

  MatrixCase(const CaseSpec& spec, const Options& options, Rng& rng) : spec(spec) {
    const auto [m, n, sides, dtype, has_master, offset, size, rank] = spec;
    std::normal_distribution<float> normal;
    grad = TypedArray(m * n, dtype, offset);
    param = TypedArray(m * n, dtype, offset);
    for (int64_t i = 0; i < m * n; ++i) {
      grad.set(i, static_cast<float>(static_cast<double>(normal(rng)) * 0.25 * size));
      param.set(i, normal(rng));
    }
    if (has_master == Master::kYes) {
      master = Array<float>(m * n, offset);
      for (int64_t i = 0; i < m * n; ++i) {
        master[i] = normal(rng);
        param.set(i, master[i]);
      }
    }
    exp_avg = randn(m * n, rng, offset);
    const SecondMoment second_moment =
        rank > 0 || sides == Sides::kVector ? SecondMoment::kFull : options.second_moment;
    if (second_moment == SecondMoment::kRankOne || second_moment == SecondMoment::kFactored) {
      row = random_positive(m, rng, offset);
      col = random_positive(n, rng, offset);
      if (second_moment == SecondMoment::kRankOne) {
        scale = Array<double>(std::vector<double>{0.4});
        normalise(row);
        normalise(col);
      }
    } else if (second_moment == SecondMoment::kFull) {
      exp_avg_sq = random_positive(rank > 0 ? spec.short_side() * (rank + 1) : m * n, rng, offset);
    }
    if (rank > 0) make_skinny(rng);
    if (sides == Sides::kBoth || sides == Sides::kLeft) {
      L = random_factor(m, rng, offset);
      Q_L = random_basis(m, rng, offset);
    }
    if (sides == Sides::kBoth || sides == Sides::kRight) {
      R = random_factor(n, rng, offset);
      Q_R = random_basis(n, rng, offset);
    }
    if (sides != Sides::kVector) {
      const bool differ =
          rank > 0 || (sides == Sides::kBoth && options.integrator == Integrator::kDiagonal);
      rho = Array<double>(std::vector<double>{0.7 * size, (differ ? 0.4 : 0.7) * size});
      if (sides == Sides::kNone) rho[0] = rho[1] = 0;
    }
    step = Array<float>(std::vector<float>{3});
    update_rms = Array<float>(std::vector<float>{0.5f});
  }

  double grad_max() const {
    float largest = 0;
    for (int64_t i = 0; i < spec.m * spec.n; ++i) {
      if (!std::isfinite(grad[i])) return std::numeric_limits<double>::quiet_NaN();
      largest = std::max(largest, std::fabs(grad[i]));
    }
    return double{largest};
  }

  Problem<float> problem(uint64_t stream) const {
    const auto pointer = [](const auto& array) { return array.size() > 0 ? array.get() : nullptr; };
    Problem<float> p{};
    p.m = spec.m;
    p.n = spec.n;
    p.dtype = spec.dtype;
    p.grad = grad.get();
    p.param = param.get();
    p.master = pointer(master);
    p.exp_avg = exp_avg.get();
    p.exp_avg_sq = pointer(exp_avg_sq);
    p.exp_avg_sq_row = pointer(row);
    p.exp_avg_sq_col = pointer(col);
    p.exp_avg_sq_scale = pointer(scale);
    p.L = pointer(L);
    p.R = pointer(R);
    p.Q_L = pointer(Q_L);
    p.Q_R = pointer(Q_R);
    p.rho = pointer(rho);
    p.skinny_rank = spec.skinny_rank;
    p.basis = pointer(basis);
    p.core = pointer(core);
    p.flat = pointer(flat);
    p.rows = pointer(rows);
    p.step = step.get();
    p.update_rms = update_rms.get();
    p.stream = stream;
    return p;
  }

  reference::Matrix reference() const {
    const int64_t m = spec.m;
    const int64_t n = spec.n;
    reference::Matrix p;
    p.grad = dense(grad, m, n);
    p.param = master.size() > 0 ? dense(master, m, n) : dense(param, m, n);
    p.exp_avg = dense(exp_avg, m, n);
    p.exp_avg_sq = spec.skinny_rank > 0 ? dense(exp_avg_sq, spec.short_side(), spec.skinny_rank + 1)
                                        : dense(exp_avg_sq, m, n);
    p.row = dense(row, 1, m);
    p.col = dense(col, 1, n);
    if (scale.size() > 0) p.scale = scale[0];
    p.L = dense(L, m, m);
    p.R = dense(R, n, n);
    p.Q_L = dense(Q_L, m, m);
    p.Q_R = dense(Q_R, n, n);
    p.is_matrix = rho.size() > 0;
    if (p.is_matrix) p.rho[0] = rho[0], p.rho[1] = rho[1];
    p.step = static_cast<double>(step[0]);
    p.update_rms = double{update_rms[0]};
    if (spec.skinny_rank == 0) return p;
    p.basis = dense(basis, 2 * spec.skinny_rank, spec.long_side());
    p.core = dense(core, 2 * spec.skinny_rank, 2 * spec.skinny_rank);
    p.flat = double{flat[0]};
    p.inner = rows[0];
    p.used = rows[1];
    return p;
  }

  // Everything that an operation may change.
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> all;
    for (const Array<float>* array :
         {&param.floats, &master, &exp_avg, &exp_avg_sq, &row, &col, &L, &R, &Q_L, &Q_R, &basis,
          &core, &flat, &step, &update_rms, &grad.floats}) {
      append_bytes(all, *array);
    }
    append_bytes(all, param.bits);
    append_bytes(all, grad.bits);
    append_bytes(all, scale);
    append_bytes(all, rho);
    return all;
  }

 private:
  // With room for another gradient, and none to spare where the rank is the short side's length.
  void make_skinny(Rng& rng) {
    const int64_t s = spec.short_side();
    const int64_t size = 2 * spec.skinny_rank;
    const int64_t inner = spec.skinny_rank - spec.skinny_rank / 4;
    const int64_t used = std::max(inner, size - 2 * s + 1);
    rows = Array<int64_t>(std::vector<int64_t>{inner, used});
    basis = random_rows(inner, used, size, spec.long_side(), rng, spec.offset);
    core = Array<float>(size * size, spec.offset);
    std::fill_n(core.get(), core.size(), 0.0f);
    const Array<float> block = random_factor(used, rng, 0);
    for (int64_t i = 0; i < used * used; ++i) core[i / used * size + i % used] = block[i];
    flat = Array<float>(std::vector<float>{0.003f});
  }

  static void normalise(const Array<float>& x) {
    double squares = 0;
    for (int64_t i = 0; i < x.size(); ++i) squares += double{x[i]} * double{x[i]};
    for (int64_t i = 0; i < x.size(); ++i) x[i] /= static_cast<float>(std::sqrt(squares));
  }
};

// The bound of the first-order analysis, with a tenth for higher orders and for how far the
// actual numbers are from the reference's, and the smallest float.
inline double bound_of(Number expected) { return 1.1 * expected.error + 0x1p-149; }

inline void require_close(const std::string& what, double actual, Number expected) {
  require_close(what, actual, expected.value, bound_of(expected));
}

inline void require_close(const std::string& what, const Array<float>& actual,
                          const Dense& expected) {
  require(what + ": size", actual.size() == static_cast<int64_t>(expected.x.size()));
  for (int64_t i = 0; i < actual.size(); ++i) {
    // The actual number is rounded to float32 whatever comes before.
    const Number x = expected.x[static_cast<size_t>(i)].rounded();
    if (std::fabs(double{actual[i]} - x.value) <= bound_of(x)) continue;
    require_close(what + "[" + std::to_string(i) + "]", double{actual[i]}, x);
  }
}

// The parameter is what rounding makes of a number within the bound: exactly for a master; for
// stochastic rounding, which keeps order, between what it makes of the ends.
inline void require_parameter(const MatrixCase& c, const Dense& expected, uint64_t key) {
  if (c.spec.dtype == DType::kFloat32) {
    require_close("param", c.param.floats, expected);
    return;
  }
  if (c.master.size() > 0) require_close("master", c.master, expected);
  for (int64_t i = 0; i < c.spec.m * c.spec.n; ++i) {
    const Number x = expected.x[static_cast<size_t>(i)].rounded();
    float lo, hi;
    if (c.master.size() > 0) {
      TypedArray nearest(1, c.spec.dtype, 0);
      nearest.set(0, c.master[i]);
      lo = hi = nearest[0];
    } else {
      const uint32_t random = random_bits(key, static_cast<uint64_t>(i));
      TypedArray ends(2, c.spec.dtype, 0);
      for (const int end : {0, 1}) {
        const double value = x.value + (2 * end - 1) * bound_of(x);
        ends.bits[end] = rounded_stochastically(static_cast<float>(value), c.spec.dtype, random);
      }
      lo = ends[0];
      hi = ends[1];
    }
    require("param is rounded as it must", lo <= c.param[i] && c.param[i] <= hi);
  }
}

// What a skinny matrix has of its own.
inline void require_skinny_matches(const MatrixCase& c, const reference::Matrix& expected) {
  const int64_t l = c.spec.long_side();
  require_close("flat", double{c.flat[0]}, expected.flat.rounded());
  require_close("core", c.core, expected.core);
  for (int64_t i = 0; i < c.basis.size(); ++i) {
    const std::string what = "basis[" + std::to_string(i / l) + "," + std::to_string(i % l) + "]";
    const Number x = expected.basis.x[static_cast<size_t>(i)];
    if (std::isnan(x.value)) {
      require(what + " is not written", std::isnan(c.basis[i]));
    } else {
      require_close(what, double{c.basis[i]}, x.rounded());
    }
  }
}

// All of the state.
inline void require_matches(const MatrixCase& c, const reference::Matrix& expected,
                            const Options& options, uint64_t stream) {
  const std::string shape = std::to_string(c.spec.m) + " x " + std::to_string(c.spec.n) + " ";
  try {
    require("step", static_cast<double>(c.step[0]) == expected.step);
    require_close("exp_avg", c.exp_avg, expected.exp_avg);
    if (c.exp_avg_sq.size() > 0) require_close("exp_avg_sq", c.exp_avg_sq, expected.exp_avg_sq);
    if (c.row.size() > 0) require_close("row", c.row, expected.row);
    if (c.col.size() > 0) require_close("col", c.col, expected.col);
    if (c.scale.size() > 0) require_close("scale", c.scale[0], expected.scale);
    if (c.L.size() > 0) require_close("L", c.L, expected.L);
    if (c.R.size() > 0) require_close("R", c.R, expected.R);
    if (c.rho.size() > 0) require_close("rho[0]", c.rho[0], expected.rho[0]);
    if (c.rho.size() > 0) require_close("rho[1]", c.rho[1], expected.rho[1]);
    if (c.spec.skinny_rank > 0) require_skinny_matches(c, expected);
    require_close("update_rms", double{c.update_rms[0]}, expected.update_rms.rounded());
    require_parameter(c, expected.param,
                      rounding_key(options.seed, stream, static_cast<uint64_t>(c.step[0])));
  } catch (const std::exception& fault) {
    throw std::runtime_error(shape + fault.what());
  }
}

}  // namespace kernel_check
