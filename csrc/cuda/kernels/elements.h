// Element-wise work: a struct for each operation says what it reads and writes, beside the state of
// the matrix.
#pragma once

#include "cuda/kernels/matrices.h"

namespace dykaf::cuda {

// What an element operation works on: an [m, n] array of a matrix. Where rows do not matter it is
// one row of all elements.
struct ElementArray {
  int64_t m;
  int64_t n;
  int32_t matrix_idx;
  int32_t tile_begin;
};

// H = load_scale grad; one row.
struct LoadProblem : ElementArray {
  float* H;
};

// Adam with the full second moment, or with none; one row.
struct AdamProblem : ElementArray {
  const float* H;  // the gradient over tau; null: the gradient itself is read
  float* update;
  double* partials;  // [num_tiles], sums of update^2
};

// Adam with row_root col_root^T in place of the root of exp_avg_sq.
struct CompactAdamProblem : ElementArray {
  const float* H;
  const float* row_root;  // [m]
  const float* col_root;  // [n]
  float* update;
  double* partials;  // [num_tiles], sums of update^2
};

// The parameter's update; one row.
struct ApplyProblem : ElementArray {
  const float* update;
};

// The same with the parameter's update; one row.
struct AdamWProblem : ElementArray {
  double* partials;  // [num_tiles], sums of update^2
};

// update <- update + diag(row) N diag(col), N Adam's numerator; one of row and col is null. Before,
// the update of a skinny matrix is the part of it in V.
struct BeyondProblem : ElementArray {
  float* update;
  const float* H;    // the gradient over tau; null without Nesterov's momentum
  const float* row;  // [m]
  const float* col;  // [n]
  double* partials;  // [num_tiles], sums of update^2
};

// The sums of an update from elsewhere; one row.
struct SquaresProblem : ElementArray {
  const float* update;
  double* partials;  // [num_tiles], sums of update^2
};

// X = update over its norm, which update_rms tells; zero stays zero. One row.
struct NormalizeProblem : ElementArray {
  const float* update;
  float* X;  // may be `update`
};

// next = (a X + next) / t of a Newton-Schulz step (dykaf/newton_schulz.h); `next` is B X before.
// One row.
struct QuinticProblem : ElementArray {
  const float* X;
  float* next;
  const float* bound;  // [1], t^2, 0 standing for 1; null: 1
  bool is_last;        // the result takes the update's scale
  double* partials;    // [num_tiles], sums of next^2
};

int64_t element_tiles(int64_t m, int64_t n);

// For each of the operations above.
template <typename ElementProblem>
int launch_elements(const Grouped<ElementProblem>& launch, const Group& group, Stream stream);

// factor <- keep factor + gain increment.
struct BlendProblem {
  float* factor;           // [size]
  const float* increment;  // [size]
  int64_t size;
  Side side;
  int32_t matrix_idx;
  int32_t tile_begin;
};
int launch_blend(const Grouped<BlendProblem>& launch, const Group& group, Stream stream);

// update_rms from the partial sums of update^2, or the norm of another array from those of its
// squares; one block per problem.
struct RmsProblem {
  const double* partials;  // [num_partials, stride], the first of each row counts
  int32_t num_partials;
  int32_t stride;
  int32_t matrix_idx;
  float* norm = nullptr;  // [1]; null: update_rms
};
int launch_update_rms(const Grouped<RmsProblem>& launch, const Group& group, Stream stream);

}  // namespace dykaf::cuda
