// The iteration that makes an update orthogonal: X <- a X + (b A + c A^2) X with A = X X^T on the
// short side, whose singular values go towards 1 (Jordan et al. 2024, Muon: the quintic's
// coefficients). It starts with singular values of at most 1: X_0 = Y / ||Y Y^T||^(1/2) with
// Y = D / ||D||, or Muon's X_0 = Y where the update is the momentum. Of s equal singular values Y
// has s^(-1/2) and X_0 has s^(-1/4): the steps that it takes to 1 hang less on the width.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "dykaf/types.h"

namespace dykaf {

struct NewtonSchulz {
  static constexpr double kA = 3.4445;
  static constexpr double kB = -4.7750;
  static constexpr double kC = 2.0315;
};

// The root mean square of an orthogonal update: as AdamW's is about, so that rates are of its size
// (Liu et al. 2025, arXiv 2502.16982).
inline constexpr double kOrthogonalRms = 0.2;

// Whether X_0 is Y / ||Y Y^T||^(1/2), and not Y.
inline bool starts_from_gram(const Options& options) {
  return options.second_moment != SecondMoment::kNone || options.is_whitened();
}

// What the last X is multiplied by.
inline double orthogonal_scale(int64_t m, int64_t n) {
  return kOrthogonalRms * std::sqrt(static_cast<double>(std::max(m, n)));
}

// An update whose direction D has a smaller root mean square than this is smaller in the same
// ratio. It is that of D for gradients of noise alone, of beta1's average or of Nesterov's
// beta1 exp_avg + (1 - beta1) G; gradients that agree make it larger. So an update fades where
// Adam's does: after a gradient that was far too large, and where eps or rows without gradients
// prevail. 0 for Muon's momentum, which has no such measure.
inline double full_rms(const Options& options) {
  if (options.second_moment == SecondMoment::kNone) return 0.0;
  const double beta = options.beta1;
  const double newest = 1 - beta * beta;
  if (!options.nesterov) return std::sqrt((1 - beta) / (1 + beta));
  return std::sqrt(newest * newest + std::pow(beta, 4) * (1 - beta) * (1 - beta) / newest);
}

}  // namespace dykaf
