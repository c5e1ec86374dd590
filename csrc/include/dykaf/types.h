// The data every operation works on: one matrix of the model with its optimizer state, as plain
// pointers and sizes. Shared by all backends; needs the standard library alone.
#pragma once

#include <cstdint>

#include "dykaf/rounding.h"

namespace dykaf {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };
// kCoupled: the averages of kDiagonal, each with the inverse of the other factor as its metric.
enum class Integrator : int32_t { kKsl, kBug, kDiagonal, kCoupled };
enum class Init : int32_t { kIdentity, kRankOne };
// kNone: the update is the momentum, as it is.
enum class SecondMoment : int32_t { kFull, kRankOne, kFactored, kNone };
// Of the factors, for whitened updates: from their diagonals in the basis, or from an
// eigendecomposition in each step.
enum class Roots : int32_t { kTracked, kExact };
// What whitened updates average: whitened gradients, or gradients.
enum class Momentum : int32_t { kWhitened, kPlain };
enum class RefreshSchedule : int32_t { kGeometric, kFixed };
enum class Side : int32_t { kLeft = 0, kRight = 1 };
enum class Rotation : int32_t { kIntoBasis, kOutOfBasis };
// How products of float32 matrices read them: as they are, as TF32 (on a GPU), as bfloat16 (on a
// CPU where it multiplies that itself); sums are float32.
enum class MatmulPrecision : int32_t { kHighest, kHigh, kMedium };
// Whether a step refreshes the bases that are due, or leaves that to a call of its own.
enum class Refreshes : int32_t { kWithStep, kApart };

// One gradient, or one matrix of a stack of gradients.
struct Gradient {
  const void* data;  // [size] in dtype, contiguous
  int64_t size;
  DType dtype;
};

// What of the options of parameter groups may differ within one step's work.
struct Rate {
  double lr;
  double weight_decay;
};

// One m x n matrix of the model and its state; T is double for float64 parameters, else float.
// All arrays are row-major and contiguous and alias nothing else. L, R, exp_avg and exp_avg_sq
// are stored in the bases Q_L and Q_R. A side without a factor has null L and Q_L (or R and Q_R).
// A matrix without any has zero rho. What is no matrix has null rho and is 1 x numel, updated by
// AdamW.
//
// A skinny matrix keeps the factor of its short side (s) as any other, and the one of its long side
// (l) as flat I + basis^T core basis, with unit trace, in the original coordinates. Its exp_avg is
// stored in the short side's basis alone; the second moment has a column for each of the first
// `skinny_rank` rows of `basis` and one for all that is orthogonal to them.
template <typename T>
struct Problem {
  int64_t m;
  int64_t n;
  DType dtype;       // of grad and param
  const void* grad;  // [m, n] in dtype, read only
  void* param;       // [m, n] in dtype
  T* master;         // [m, n], the parameter in full precision; null: none
  T* exp_avg;        // [m, n]

  T* exp_avg_sq;      // [m, n], skinny: [s, k + 1]; null with a compact second moment or none
  T* exp_avg_sq_row;  // [m]; of a compact second moment
  T* exp_avg_sq_col;  // [n]; of a compact second moment
  double* exp_avg_sq_scale;  // [1]; rank_one: the second moment is scale^2 row col^T

  T* L;         // [m, m], symmetric, unit Frobenius norm
  T* R;         // [n, n], symmetric, unit Frobenius norm
  T* Q_L;       // [m, m], orthogonal, one basis vector per column
  T* Q_R;       // [n, n], orthogonal, one basis vector per column
  double* rho;  // [2], gradient units; the tracked Fisher matrix is rho^2 L (x) R

  // Of a skinny matrix, else null and 0; k = skinny_rank.
  int64_t skinny_rank;
  T* basis;       // [2 k, l]: orthonormal rows, then gradients since the last refresh
  T* core;        // [2 k, 2 k], symmetric, zero beyond the rows in use
  T* flat;        // [1]
  int64_t* rows;  // [2]: orthonormal rows, rows in use; on the host

  float* step;                 // [1], updates done
  int64_t* next_refresh;       // [2], per Side: the step from which a refresh is due; on the host
  int64_t* refreshes;          // [2], per Side: refreshes done; on the host
  int64_t* schedule_step;      // [1], steps since the first gradient, skipped ones too; on the host
  int64_t* refresh_fallbacks;  // [1], refreshes that failed and kept the old basis
  float* update_rms;           // [1], root mean square of the last update before lr
  int64_t refresh_offset[2];   // per Side: place in the refresh period
  Rate rate;                   // of the parameter
  uint64_t stream;             // names the random numbers of this matrix
  Place place;                 // of a shard's elements in its matrix, for the same numbers
  double grad_max;             // max|grad|

  bool is_adamw() const { return rho == nullptr; }
  bool is_unsided() const { return L == nullptr && R == nullptr; }
  bool is_skinny() const { return basis != nullptr; }
  bool is_wide() const { return m < n; }
  int64_t size() const { return m * n; }
  int64_t short_side() const { return is_wide() ? m : n; }
  int64_t long_side() const { return is_wide() ? n : m; }

  // The longest side whose basis Adam's gradients are rotated to, 0 without one.
  int64_t rotated_side() const {
    const int64_t rows = Q_L != nullptr ? m : 0;
    const int64_t cols = Q_R != nullptr ? n : 0;
    return rows > cols ? rows : cols;
  }

  bool has_factor(Side side) const {
    return (side == Side::kLeft ? L : R) != nullptr || is_skinny();
  }

  // Of a skinny matrix: no rows are left for another gradient.
  bool is_full() const { return is_skinny() && rows[1] + short_side() > 2 * skinny_rank; }
};

// The other options of parameter groups, as in dykaf.DyKAF and dykaf.FISMO.
struct Options {
  double beta1;
  double beta2;
  double eps;
  double factor_beta;
  double grad_scale;  // gradients are multiplied by it: +1 or -1 over GradScaler's scale
  int64_t precondition_frequency;
  uint64_t seed;
  Integrator integrator;
  Init init;
  SecondMoment second_moment;
  RefreshSchedule refresh_schedule;
  bool rescale_exp_avg_sq;
  MatmulPrecision precision;
  double basis_rounding;  // relative, of a basis's entries: 2^-9 where they are kept in bfloat16
  bool nesterov;          // of matrices
  int64_t orthogonalize;  // Newton-Schulz steps on the update of a matrix; 0: none

  // Of whitened updates (dykaf/whitening.h); exponent 0: Adam's instead.
  double exponent = 0;
  double damping = 0;  // of the factors' averages, relative
  Roots roots = Roots::kTracked;
  Momentum momentum = Momentum::kWhitened;
  bool graft = false;  // the update has the norm that it has when it is orthogonalised

  bool is_whitened() const { return exponent > 0; }

  bool operator==(const Options&) const = default;
};

}  // namespace dykaf
