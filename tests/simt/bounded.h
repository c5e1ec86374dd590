// Numbers that carry a bound of the error that float32 arithmetic makes: the references compute
// with them, so that every tolerance is derived along with the value it belongs to (running error
// analysis; Higham, "Accuracy and Stability of Numerical Algorithms", 3.3).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "dykaf/cuda_ops.h"

namespace kernel_check {

inline constexpr double kRoundoff = 0x1p-24;  // of a float32 operation, to nearest

struct Number {
  double value = 0;
  double error = 0;  // |what float32 arithmetic gives - value| is at most this

  Number() = default;
  Number(double exact) : value(exact) {}
  Number(double value, double error) : value(value), error(error) {}

  // After one more rounding to float32. (A double on the device rounds less: the bound still
  // holds.)
  Number rounded() const { return {value, error + kRoundoff * std::fabs(value)}; }
};

inline Number operator+(Number x, Number y) {
  return Number(x.value + y.value, x.error + y.error).rounded();
}

inline Number operator-(Number x, Number y) { return x + Number(-y.value, y.error); }

inline Number operator*(Number x, Number y) {
  const double error =
      std::fabs(x.value) * y.error + std::fabs(y.value) * x.error + x.error * y.error;
  return Number(x.value * y.value, error).rounded();
}

inline Number operator/(Number x, Number y) {
  const double quotient = x.value / y.value;
  // The smallest divisor in reach; where it reaches zero nothing is known.
  const double least = std::max(0.0, std::fabs(y.value) - y.error);
  return Number(quotient, (x.error + std::fabs(quotient) * y.error) / least).rounded();
}

inline Number sqrt(Number x) {
  const double root = std::sqrt(x.value);
  // |sqrt(x + e) - sqrt(x)| <= sqrt(e), and e / sqrt(x) where that is less.
  const double error = std::min(std::sqrt(x.error), root > 0 ? x.error / root : HUGE_VAL);
  return Number(root, error).rounded();
}

// x, or 0 if its magnitude is below `noise`; either where that hangs on the error.
inline Number without_noise(Number x, double noise) {
  const double magnitude = std::fabs(x.value);
  if (magnitude + x.error < noise) return 0;
  if (magnitude - x.error <= noise) return {x.value, x.error + magnitude};
  return x;
}

// Within [-bound, bound], itself rounded.
inline Number clamped(Number x, double bound) {
  const double error = std::min(x.error, 2 * bound) + kRoundoff * bound;
  return {std::clamp(x.value, -bound, bound), error};
}

// A matrix of them, row-major.
struct Dense {
  int64_t m = 0;
  int64_t n = 0;
  std::vector<Number> x;

  Dense() = default;
  Dense(int64_t m, int64_t n) : m(m), n(n), x(static_cast<size_t>(m * n)) {}

  bool is_null() const { return x.empty(); }
  Number& at(int64_t i, int64_t j) { return x[static_cast<size_t>(i * n + j)]; }
  const Number& at(int64_t i, int64_t j) const { return x[static_cast<size_t>(i * n + j)]; }
};

inline Dense transposed(const Dense& A) {
  Dense T(A.n, A.m);
  for (int64_t i = 0; i < A.m; ++i) {
    for (int64_t j = 0; j < A.n; ++j) T.at(j, i) = A.at(i, j);
  }
  return T;
}

// a A + b B.
inline Dense combined(Number a, const Dense& A, Number b, const Dense& B) {
  Dense sum(A.m, A.n);
  for (size_t i = 0; i < sum.x.size(); ++i) sum.x[i] = a * A.x[i] + b * B.x[i];
  return sum;
}

// Error of a product over |a b| that the tensor cores' inputs make: 3xTF32 leaves out 2^-22 of a
// product and rounds its parts by as much; TF32 keeps 11 bits, bfloat16 8, of both operands.
inline double input_error(dykaf::cuda::MatmulPrecision precision) {
  switch (precision) {
    case dykaf::cuda::MatmulPrecision::kHighest:
      return 0x1p-20;
    case dykaf::cuda::MatmulPrecision::kHigh:
      return 2 * 0x1p-11 + 0x1p-22;
    case dykaf::cuda::MatmulPrecision::kMedium:
      return 2 * 0x1p-8 + 0x1p-16;
  }
  return 0;
}

// How the errors of a sum's terms add up. The worst case is a proof and good enough at full
// precision. Through six products with inputs of 8 or 11 bits it says nothing any more: there
// errors are taken as independent, their squares add up (Higham & Mary 2019), and what a rounding
// can make counts four times.
enum class Errors { kWorstCase, kIndependent };
inline Errors g_errors = Errors::kWorstCase;

inline Errors errors_at(dykaf::cuda::MatmulPrecision precision) {
  return precision == dykaf::cuda::MatmulPrecision::kHighest ? Errors::kWorstCase
                                                             : Errors::kIndependent;
}

class ErrorSum {
 public:
  // inherited: of the operands; fresh: by a rounding.
  void add(double inherited, double fresh) {
    if (g_errors == Errors::kWorstCase) {
      sum_ += inherited + fresh;
    } else {
      sum_ += inherited * inherited + 16 * fresh * fresh;
    }
  }
  double total() const { return g_errors == Errors::kWorstCase ? sum_ : std::sqrt(sum_); }

 private:
  double sum_ = 0;
};

// A B, with k float32 additions to nearest in any order: (k + 2) roundings of sum |a b|.
inline Dense multiplied(const Dense& A, const Dense& B, dykaf::cuda::MatmulPrecision precision) {
  const double relative = static_cast<double>(A.n + 2) * kRoundoff + input_error(precision);
  Dense C(A.m, B.n);
  std::vector<ErrorSum> errors(C.x.size());
  for (int64_t i = 0; i < A.m; ++i) {
    for (int64_t k = 0; k < A.n; ++k) {
      const Number a = A.at(i, k);
      const double magnitude = std::fabs(a.value);
      for (int64_t j = 0; j < B.n; ++j) {
        const Number b = B.at(k, j);
        C.at(i, j).value += a.value * b.value;
        errors[static_cast<size_t>(i * B.n + j)].add(
            magnitude * b.error + (std::fabs(b.value) + b.error) * a.error,
            relative * magnitude * std::fabs(b.value));
      }
    }
  }
  for (size_t i = 0; i < errors.size(); ++i) C.x[i].error = errors[i].total();
  return C;
}

// A thread adds this many terms in float32 at most (a 128 x 128 tile over 256 threads); the rest of
// a sum runs in double.
inline constexpr double kTermsInFloat = 64;

// <A, B>.
inline Number inner(const Dense& A, const Dense& B) {
  double sum = 0;
  ErrorSum error;
  for (size_t i = 0; i < A.x.size(); ++i) {
    const Number term = A.x[i] * B.x[i];
    sum += term.value;
    error.add(term.error, kTermsInFloat * kRoundoff * std::fabs(term.value));
  }
  return {sum, error.total()};
}

}  // namespace kernel_check
