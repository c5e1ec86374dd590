// Skinny matrices: see dykaf/types.h for their state and docs/algorithm.md for the
// mathematics. The optimizer's integrator is the diagonal one of metric power 0, the average of
// G G^T and G^T G.
#pragma once

#include "cpu/aten.h"
#include "dykaf/types.h"

namespace dykaf::cpu {

// The state as tensors over its memory, the short side first: [s, l] whichever side it is.
struct SkinnyMatrix {
  template <typename T>
  explicit SkinnyMatrix(const Problem<T>& p);

  bool is_tall;  // the parameter is l x s
  int64_t rank;
  int64_t* rows;
  int64_t* short_refreshes;
  int64_t* long_refreshes;
  at::Tensor F;           // [s, s], the short side's factor
  at::Tensor Q;           // [s, s]
  at::Tensor basis;       // [2 k, l]
  at::Tensor core;        // [2 k, 2 k]
  at::Tensor flat;        // []
  at::Tensor exp_avg;     // [s, l]
  at::Tensor exp_avg_sq;  // [s, k + 1]
  double* rho_short;
  double* rho_long;  // the long side's average is rho_long^2 of its factor
  float* step;
  float* update_rms;
  int64_t* fallbacks;

  // From [m, n] to [s, l] and back.
  at::Tensor oriented(const at::Tensor& x) const { return is_tall ? x.t() : x; }
};

// Adam, then the factors, with the gradient H [s, l] over tau. Returns the update [s, l], in the
// original coordinates.
at::Tensor skinny_step_(const SkinnyMatrix& w, const Options& options, const at::Tensor& H,
                        double tau);

// The first gradient that is not zero.
void initialize_skinny_(const SkinnyMatrix& w, const Options& options, const at::Tensor& H,
                        double tau);

// One power iteration of a basis; the long side's gradients become part of its basis.
void refresh_short_(const SkinnyMatrix& w, const Options& options);
void refresh_long_(const SkinnyMatrix& w, const Options& options);

template <typename T>
void refresh_skinny_(const Problem<T>& p, const Options& options, Side side) {
  const SkinnyMatrix w(p);
  const bool is_short = (side == Side::kLeft) == (p.m < p.n);
  is_short ? refresh_short_(w, options) : refresh_long_(w, options);
}

}  // namespace dykaf::cpu
