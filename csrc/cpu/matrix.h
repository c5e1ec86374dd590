// The operations on one matrix, from which ops.h's list forms and the fused step are made. H is the
// gradient over tau throughout: a power of two of the size of the gradient or the factors, so that
// nothing overflows or vanishes and the scaling is exact.
#pragma once

#include <span>

#include "aten/torch.h"
#include "dykaf/types.h"

namespace dykaf::cpu {

// Scratch memory for any one of `problems`, used again for each.
template <typename T>
struct Workspace {
  explicit Workspace(std::span<const Problem<T>> problems);

  at::Tensor memory;
  T* gradient;  // [m, n]
  T* product;   // [m, n]
  T* update;    // [m, n]
  T* turned;    // [m, n]
  T* left;      // [m, m]
  T* right;     // [n, n]
  T* skinny;    // [s (2 k + 1)] of a skinny matrix
};

// The least power of two >= max(max|G|, rho_L, rho_R), kept where it and its inverse are normal.
template <typename T>
T gradient_scale(const Problem<T>& p, const Options& options);

// H = grad_scale G / tau.
template <typename T>
void load_gradient(const Problem<T>& p, const Options& options, T tau, T* H);

// Uses `product` and `turned`.
template <typename T>
void rotate(const Problem<T>& p, Rotation rotation, MatmulPrecision precision, const T* input,
            T* output, const Workspace<T>& workspace);

// `update` may alias H.
template <typename T>
void adam_update_(const Problem<T>& p, const Options& options, const T* H, T tau, T* update);

// Uses `product` and `turned`.
template <typename T>
void orthogonalize_(const Problem<T>& p, const Options& options, T* update,
                    const Workspace<T>& workspace);

template <typename T>
void apply_update_(const Problem<T>& p, const Options& options, const T* update);

// The same for elements [begin, end); update[0] belongs to element `begin`.
template <typename T>
void apply_range_(const Problem<T>& p, const Options& options, const T* update, int64_t begin,
                  int64_t end);

// AdamW of a parameter without factors, in one pass.
template <typename T>
void adamw_(const Problem<T>& p, const Options& options);

template <typename T>
void factor_update_(const Problem<T>& p, const Options& options, const T* H, T tau,
                    const Workspace<T>& workspace);

// Adam and the factors of a skinny matrix. H is in the workspace's `gradient`; uses all but
// `update`, which takes the update in the original coordinates.
template <typename T>
void skinny_step_(const Problem<T>& p, const Options& options, const T* H, T tau, T* update,
                  const Workspace<T>& workspace);

// As a matrix is before its first gradient.
template <typename T>
void reset_(const Problem<T>& p);

}  // namespace dykaf::cpu
