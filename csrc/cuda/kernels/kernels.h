// The grouped kernels beside gemm: what each works on, and its launcher. Launchers take the
// problem array on the device and return a cudaError_t.
#pragma once

#include <cstdint>

#include "cuda/kernels/scalars.h"
#include "dykaf/cuda_ops.h"

namespace dykaf::cuda {

// The matrices of a launch, and their scalars; on the device.
struct Matrices {
  const Problem<float>* problems;  // [num]
  MatrixScalars* scalars;          // [num]
  int32_t num;
};

// A grouped launch over `problems`, with `grid` blocks.
template <typename GroupedProblem>
struct Grouped {
  const GroupedProblem* problems;
  int32_t num;
  int64_t grid;
};

// max|gradient|, in two stages: over blocks, then over each gradient's blocks.
struct GradMaxProblem {
  Gradient gradient;
  float* partials;  // [num_tiles], NaN where an entry is not finite
  double* maximum;  // [1]
  int32_t num_tiles;
  int32_t tile_begin;
};
int64_t grad_max_tiles(int64_t size);
int launch_grad_max(const Grouped<GradMaxProblem>& launch, Stream stream);
int launch_grad_max_finish(const Grouped<GradMaxProblem>& launch, Stream stream);

// Fills in the scalars; kAdvance: a step begins.
enum class StepCount : int32_t { kKeep, kAdvance };
int launch_prepare(const Matrices& matrices, const Options& options, const DeviceInputs& inputs,
                   StepCount step_count, Stream stream);

// Element-wise work on flat arrays.
struct ElementProblem {
  const float* in;   // load: unused. adam: H. apply: the update. weigh: H. beyond: the part within
  float* out;        // load: H. adam, beyond: the update. weigh: H weighed
  const float* row;  // adam: sqrt of the compact second moment; weigh, beyond: weights; or null
  const float* col;
  double* partials;  // adam, beyond: [num_tiles], sums of update^2
  int64_t m;
  int64_t n;
  int32_t matrix_idx;
  int32_t tile_begin;
};
enum class ElementOp : int32_t {
  kLoad,     // out = load_scale grad
  kAdam,     // Adam with the full second moment: in, out, partials; 1 x size
  kCompact,  // Adam with the root row col^T in place of the second moment; m x n
  kApply,    // the parameter's update; 1 x size
  kAdamW,    // AdamW of a parameter without factors, from its gradient; partials; 1 x size
  kWeigh,    // out = diag(row) in diag(col), null: 1; m x n
  kBeyond,   // out = the update of a skinny matrix, in + diag(row) exp_avg diag(col); partials; m x
             // n
};
int64_t element_tiles(int64_t m, int64_t n);
int launch_elements(ElementOp op, const Grouped<ElementProblem>& launch, const Matrices& matrices,
                    Stream stream);

// update_rms from the partial sums of update^2; one block per matrix.
struct RmsProblem {
  const double* partials;  // [num_partials, stride], the first of each row counts
  int32_t num_partials;
  int32_t stride;
  int32_t matrix_idx;
};
int launch_update_rms(const Grouped<RmsProblem>& launch, const Matrices& matrices, Stream stream);

// The coefficients of the factors' new values, and rho, from inner products; one block
// per matrix.
enum class FactorStage : int32_t { kKslLeft, kKslRight, kBug, kAverageLeft, kAverageRight };
struct FactorProblem {
  const double* left;      // [left_tiles, 3]: <L,L>, <L,A>, <A,A>, A the increment of L
  const double* right;     // the same of R
  const double* coupling;  // [coupling_tiles, 3], the second counts: <A H, H B>
  int32_t left_tiles;
  int32_t right_tiles;
  int32_t coupling_tiles;
  int32_t matrix_idx;
  double size;  // average: increments are divided by it
  FactorStage stage;
};
int launch_factor_scalars(const Grouped<FactorProblem>& launch, const Matrices& matrices,
                          double factor_beta, Stream stream);

// factor <- keep factor + gain increment.
struct BlendProblem {
  float* factor;           // [size]
  const float* increment;  // [size]
  int64_t size;
  Side side;
  int32_t matrix_idx;
  int32_t tile_begin;
};
int launch_blend(const Grouped<BlendProblem>& launch, const Matrices& matrices, Stream stream);

// weights = clamp(diag F / mean, 1e-4)^power with mean 1; one block per factor.
struct MetricProblem {
  const float* factor;  // [n, n]
  float* weights;       // [n]
  int32_t n;
  int32_t matrix_idx;
};
int launch_metric_weights(const Grouped<MetricProblem>& launch, const Matrices& matrices,
                          double power, Stream stream);

// The compact second moments: sums of H^2 along rows and columns, then the vectors.
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
int launch_moment(MomentStage stage, const Grouped<MomentProblem>& launch, const Matrices& matrices,
                  double beta2, Stream stream);

// Skinny matrices, s the short and l the long side; V is `inner` rows of `basis`.
struct SkinnyProblem {
  const float* X;         // [m, n], the gradient over tau, in the short side's basis
  double* sums;           // [skinny_pieces, s], of X^2 along pieces of the long side
  double* momentum_sums;  // the same of exp_avg^2
  const float* XV;        // X V^T, [s, inner]; of a tall matrix its transpose
  float* MV;              // as XV for exp_avg; kMoments turns it into what V is multiplied by
  float* beyond;          // [s], what exp_avg is multiplied by
  int32_t inner;
  int32_t used;         // rows of `basis` in use: X follows them
  bool updates_factor;  // or else X does not, and the long side's factor stays
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
int launch_skinny(SkinnyStage stage, const Grouped<SkinnyProblem>& launch, const Matrices& matrices,
                  double factor_beta, Stream stream);

}  // namespace dykaf::cuda
