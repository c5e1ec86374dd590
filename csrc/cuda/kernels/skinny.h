// What skinny matrices have of their own.
#pragma once

#include "cuda/kernels/matrices.h"

namespace dykaf::cuda {

// Skinny matrices, s the short and l the long side; V is `inner` rows of `basis`.
struct SkinnyProblem {
  const float* X;         // [m, n], the gradient over tau, in the short side's basis
  double* sums;           // [skinny_pieces, s], of X^2 along pieces of the long side
  double* momentum_sums;  // the same of exp_avg^2
  const float* XV;        // X V^T, [s, inner]; of a tall matrix its transpose
  float* MV;              // as XV for exp_avg; kMoments turns it into what V is multiplied by
  float* beyond;          // [s], what exp_avg is multiplied by
  int32_t inner;
  int32_t used;  // rows of `basis` in use: X follows them
  int32_t matrix_idx;
  int32_t tile_begin;
};
enum class SkinnyStage : int32_t {
  kGradient,    // exp_avg, both sums, X as rows of `basis`
  kMoments,     // exp_avg_sq, MV, beyond
  kLongFactor,  // core, flat and rho of the long side; one block per matrix
};
int64_t skinny_pieces(int64_t l);
int64_t skinny_tiles(SkinnyStage stage, int64_t s, int64_t l);
int launch_skinny(SkinnyStage stage, const Grouped<SkinnyProblem>& launch, const Group& group,
                  double factor_beta, Stream stream);

}  // namespace dykaf::cuda
