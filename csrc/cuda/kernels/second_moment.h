// The compact second moments.
#pragma once

#include "cuda/kernels/matrices.h"

namespace dykaf::cuda {

// Sums of H^2 along rows and columns, then the vectors.
struct MomentProblem {
  const float* H;    // [m, n]
  double* row_sums;  // [m]
  double* col_sums;  // [n]
  double* u;         // [m], rank_one: the new unit row vector; null: factored
  double* scratch;   // [2], rank_one: the S-step's number; whether the update goes on
  float* row_root;   // [m], sqrt of the second moment = row_root col_root^T
  float* col_root;   // [n]
  int32_t matrix_idx;
  int32_t tile_begin;
};
enum class MomentStage : int32_t { kRowSums, kRowVector, kColSums, kVectors };
int64_t moment_tiles(MomentStage stage, int64_t m, int64_t n);
int launch_moment(MomentStage stage, const Grouped<MomentProblem>& launch, const Group& group,
                  double beta2, Stream stream);

}  // namespace dykaf::cuda
