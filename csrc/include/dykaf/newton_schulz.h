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
  return options.second_moment != SecondMoment::kNone;
}

// The root mean square of D for gradients of noise alone: of beta1's average, or of Nesterov's
// beta1 exp_avg + (1 - beta1) G. Gradients that agree make it larger.
inline double noise_rms(const Options& options) {
  const double beta = options.beta1;
  const double newest = 1 - beta * beta;
  if (!options.nesterov) return std::sqrt((1 - beta) / (1 + beta));
  return std::sqrt(newest * newest + std::pow(beta, 4) * (1 - beta) * (1 - beta) / newest);
}

// What the last X is multiplied by, of an update whose direction D has this root mean square. Where
// D is smaller than noise is, the update is smaller in the same ratio: it fades where Adam's does,
// after a gradient that was far too large, and where eps or rows without gradients prevail. Muon's
// momentum has no such measure.
inline double orthogonal_scale(int64_t m, int64_t n, double direction_rms, const Options& options) {
  const double scale = kOrthogonalRms * std::sqrt(static_cast<double>(std::max(m, n)));
  const bool is_momentum = options.second_moment == SecondMoment::kNone;
  return is_momentum ? scale : scale * std::min(1.0, direction_rms / noise_rms(options));
}

}  // namespace dykaf
