// Whitened updates (FISMO: Xu, Yan & Zhang, arXiv 2601.21750; Mousse: Zhang et al., arXiv
// 2603.09697). With the factors P = m L / tr(L) and Q = n R / tr(R), G the rotated gradient and e
// the exponent, after the factors have seen G:
//
//   M <- beta1 M + (1 - beta1) P^-e G Q^-e / sqrt(p)   Momentum::kWhitened
//   M <- beta1 M + (1 - beta1) G / sqrt(p)             Momentum::kPlain
//   U  = P^-e orthogonalised(P^-e M Q^-e) Q^-e         with the inner powers for kPlain alone
//
// p is the mean eigenvalue of rho[0]^2 L, or R where there is no L: gradients of any size weigh
// alike, and one that is far too large no more than (1 - factor_beta)^(-1/2) times as much. Tracked
// powers are those of the factors' diagonals in the basis.
#pragma once

#include <cstdint>

#include "dykaf/bounds.h"

namespace dykaf {

// Eigenvalues of a factor below this share of its largest are rounding, and count as this much.
template <typename T>
double least_eigenvalue(int64_t size) {
  return rounding_share<T>(size);
}

// The exponent that makes a factor the metric of the other one's average: H Q^-1/2 times its own
// transpose.
inline constexpr double kMetricExponent = 0.5;

}  // namespace dykaf
