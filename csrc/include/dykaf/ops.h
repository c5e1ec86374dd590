// The operations of the optimizer. Each takes a list of matrices of any shapes; a trailing
// underscore means that state is changed in place. Callers guarantee what types.h says of pointers;
// the bindings check it. T is float or double. Source: Yudin et al., arXiv 2511.06477, and
// docs/algorithm.md for the forms used here.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "dykaf/types.h"

namespace dykaf {

// Places of matrices in the list of a step.
struct StepReport {
  std::vector<size_t> failed;   // could not be updated, and are as before
  std::vector<size_t> stayed;   // their old basis stayed
  std::vector<size_t> waiting;  // on a device: have seen zero gradients alone
};

namespace cpu {

// maxima[i] = max|gradients[i]|, or NaN where an entry is not finite.
void grad_max(std::span<const Gradient> gradients, double* maxima);

// outputs[i] = Q_L^T inputs[i] Q_R (into the basis) or Q_L inputs[i] Q_R^T (out of it); a missing
// basis is the identity. inputs and outputs: [m, n]; outputs may alias inputs.
template <typename T>
void rotate(std::span<const Problem<T>> problems, Rotation rotation, MatmulPrecision precision,
            const T* const* inputs, T* const* outputs);

// One Adam step in the basis: advances step, exp_avg, the second moment and update_rms with the
// rotated gradient `grad` and writes the update D [m, n] (bias-corrected, before lr) to updates[i].
template <typename T>
void adam_update_(std::span<const Problem<T>> problems, const Options& options, T* const* updates);

// updates[i] [m, n], in the basis or out of it, towards the nearest orthogonal matrix by
// Newton-Schulz steps, times dykaf/newton_schulz.h's scale; sets update_rms. Of matrices with
// factors that are not skinny.
template <typename T>
void orthogonalize_(std::span<const Problem<T>> problems, const Options& options,
                    T* const* updates);

// param <- param (1 - lr weight_decay) - lr updates[i] by the matrix's rate, updates: [m, n] in
// original coordinates.
// bfloat16 and float16 parameters round stochastically, or to nearest from `master` if there is
// one.
template <typename T>
void apply_update_(std::span<const Problem<T>> problems, const Options& options,
                   const T* const* updates);

// One step of the projector-splitting integrator on L, R and rho with the rotated gradient `grad`.
// A factor whose new norm is zero stays as it was.
template <typename T>
void factor_update_(std::span<const Problem<T>> problems, const Options& options);

// What the first gradient that is not zero does: factors from the prior and this gradient, first
// bases, factors rotated into them, first refresh dates. A zero gradient changes nothing.
template <typename T>
void initialize_(std::span<const Problem<T>> problems, const Options& options);

// One power iteration with orthonormalisation of the bases of `side`, due or not; L or R, exp_avg
// and the second moment follow. On failure the old basis stays and refresh_fallbacks counts it.
template <typename T>
void refresh_basis_(std::span<const Problem<T>> problems, const Options& options, Side side);

// Counts a step of each matrix that has had its first gradient, and refreshes the bases due then.
template <typename T>
void refresh_due_(std::span<const Problem<T>> problems, const Options& options);

// The whole step: the above in their order. `initialize_` comes first, and with it everything that
// can fail before anything has changed; `reset_` takes it back.
template <typename T>
class Step {
 public:
  // Allocates what the step needs; changes nothing.
  Step(std::span<const Problem<T>> problems, const Options& options, Refreshes refreshes);
  ~Step();
  Step(Step&&) noexcept;

  // What the first gradients do. Where that fails, all matrices are as before, and it throws.
  void initialize_();
  // Undoes initialize_.
  void reset_();

  // The step of all that had their first gradient before, and the refreshes.
  StepReport run_();

  // Whether some had none yet.
  bool has_fresh() const;

 private:
  struct Memory;
  std::unique_ptr<Memory> memory_;
};

}  // namespace cpu

}  // namespace dykaf
