// Skinny matrices: see dykaf/types.h for their state and docs/algorithm.md for the
// mathematics. The optimizer's integrator is the diagonal one of metric power 0, the average of
// G G^T and G^T G.
#pragma once

#include <span>

#include "cpu/aten.h"
#include "dykaf/types.h"

namespace dykaf::cpu {

// The state as tensors over its memory on any device, the short side first: [s, l] whichever side
// it is.
struct SkinnyMatrix {
  template <typename T>
  explicit SkinnyMatrix(const Problem<T>& p, at::Device device = at::kCPU);

  bool is_tall;  // the parameter is l x s
  int64_t rank;
  int64_t* rows;             // on the host
  int64_t* short_refreshes;  // on the host
  int64_t* long_refreshes;   // on the host
  at::Tensor F;              // [s, s], the short side's factor
  at::Tensor Q;              // [s, s]
  at::Tensor basis;          // [2 k, l]
  at::Tensor core;           // [2 k, 2 k]
  at::Tensor flat;           // []
  at::Tensor exp_avg;        // [s, l]
  at::Tensor exp_avg_sq;     // [s, k + 1]
  at::Tensor step;           // [], float32
  at::Tensor fallbacks;      // [], int64

  // From [m, n] to [s, l] and back.
  at::Tensor oriented(const at::Tensor& x) const { return is_tall ? x.t() : x; }
};

// Adam, then the factors, on the CPU, with the gradient H [m, n] over tau. Returns the update [m,
// n], in the original coordinates. Everything that may fail comes before anything changes.
template <typename T>
at::Tensor skinny_step_(const Problem<T>& p, const Options& options, const at::Tensor& H,
                        double tau);

// What the first gradient that is not zero leaves beside the tensors.
struct SkinnyStart {
  double rho[2];      // per Side
  int64_t fallbacks;  // bases that could not be had
};
SkinnyStart initialize_skinny_(const SkinnyMatrix& w, const Options& options, const at::Tensor& H,
                               double tau);

// The second moments [..., s, k + 1] are at least what the momentum [..., s, l] in the directions V
// [..., inner, l] and beyond them needs (dykaf/bounds.h) after `steps` [...].
void bound_second_moment_(at::Tensor exp_avg_sq, const Options& options, const at::Tensor& exp_avg,
                          const at::Tensor& V, const at::Tensor& steps);

// One power iteration of a basis.
void refresh_short_(const SkinnyMatrix& w, const Options& options);

// The same of long sides, whose gradients become part of their bases; on any device. The matrices
// have one shape and rank and the same rows in use.
void refresh_long_(std::span<const SkinnyMatrix> matrices, const Options& options);

// What is left to a refresh of the long side that cannot be done: the old basis, without the
// gradients since, so that there is room for others.
void forget_gradients_(const SkinnyMatrix& w);

}  // namespace dykaf::cpu
