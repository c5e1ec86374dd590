// The scale of the factors that the first gradient starts from.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "dykaf/types.h"

namespace dykaf {

// The prior of a lesser beta is so large that the gradient, which weighs as much, would vanish in
// float32 beside it.
constexpr double kLeastBeta = 1e-24;

// rho of each side for factors that start as scaled identities, from ||G||_F of the first gradient:
// the prior's weight equals that of the gradient, since the two terms of K have the same trace.
// Below kLeastBeta there is no prior.
inline std::array<double, 2> prior_rho(const Options& options, int64_t m, int64_t n, bool two_sided,
                                       double gradient_norm) {
  const auto rows = static_cast<double>(m);
  const auto cols = static_cast<double>(n);
  const double beta = options.factor_beta;
  const double size = gradient_norm * std::sqrt(beta > kLeastBeta ? (1 - beta) / beta : 0);
  const bool has_averages =
      options.integrator == Integrator::kDiagonal || options.integrator == Integrator::kCoupled;
  if (two_sided && has_averages) {
    return {size / std::sqrt(cols * std::sqrt(rows)), size / std::sqrt(rows * std::sqrt(cols))};
  }
  const double rho = size / std::sqrt(std::sqrt(rows * cols));
  return {rho, rho};
}

// rho of each side for factors that start as u u^T and v v^T of G = sigma u v^T. "diagonal"
// averages G G^T / n and G^T G / m, the splitting integrators keep rho^2 of their product.
inline std::array<double, 2> rank_one_rho(const Options& options, int64_t m, int64_t n,
                                          double sigma) {
  if (options.integrator != Integrator::kDiagonal) return {sigma, sigma};
  return {sigma / std::sqrt(static_cast<double>(n)), sigma / std::sqrt(static_cast<double>(m))};
}

}  // namespace dykaf
