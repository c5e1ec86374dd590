// The iteration that makes an update orthogonal: X_0 = D / ||D||, then
// X <- a X + (b A + c A^2) X with A = X X^T on the short side, whose singular values go towards 1
// (Jordan et al. 2024, Muon: the quintic's coefficients).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace dykaf {

struct NewtonSchulz {
  static constexpr double kA = 3.4445;
  static constexpr double kB = -4.7750;
  static constexpr double kC = 2.0315;
};

// The root mean square of an orthogonal update: as AdamW's is about, so that rates are of its size
// (Liu et al. 2025, arXiv 2502.16982).
inline constexpr double kOrthogonalRms = 0.2;

// What the last X is multiplied by.
inline double orthogonal_scale(int64_t m, int64_t n) {
  return kOrthogonalRms * std::sqrt(static_cast<double>(std::max(m, n)));
}

}  // namespace dykaf
