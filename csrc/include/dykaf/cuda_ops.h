// The operations of ops.h on a GPU. An operation over a list of matrices is planned on the host:
// the plan holds an image of all problem descriptions, which the caller copies to the device, and a
// fixed sequence of launches, whose number does not hang on the number of matrices. Nothing here
// allocates device memory, copies or synchronises; the caller brings memory and stream. All
// pointers in problems and inputs are device pointers, apart from Problem::next_refresh and
// Problem::refreshes. float32 state only. Sources: as in ops.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "dykaf/cuda_library.h"
#include "dykaf/types.h"

namespace dykaf::cuda {

// On the tensor cores: three TF32 products (close to float32), one TF32 product, bfloat16 inputs.
using dykaf::MatmulPrecision;

// What a step needs beside the matrices and is on the device already.
struct DeviceInputs {
  const double* grad_max;  // [num_matrices], max|grad|
  const int32_t* skip;     // [1], not 0: the step changes nothing; null: never
  const float* amp_scale;  // [1], GradScaler's; gradients are divided by it; null: 1
  const float* lr;         // [1], in place of every Rate::lr; null: none
};

struct PlanInputs {
  Options options;
  DeviceInputs device;
};

class Plan {
 public:
  using Launch = std::function<int(const std::byte* image, Stream stream)>;

  // Bytes of scratch memory that the plan's launches use from the `workspace` it was made with.
  int64_t workspace_bytes = 0;
  // To be copied to the device, to an address that is a multiple of 256.
  std::vector<std::byte> image;
  std::vector<Launch> launches;
  // What the first launch of an operation with options reads; null for one without.
  std::shared_ptr<PlanInputs> inputs;

  // Launches everything on `stream` with the copy of `image` at `device_image`. Returns the first
  // cudaError_t that is not cudaSuccess, or 0.
  int run(const void* device_image, Stream stream) const;
};

// Each plan_* below describes the operation of ops.h with the same name. `workspace` may be null to
// learn workspace_bytes; such a plan must not run. It is a multiple of 256.

Plan plan_grad_max(std::span<const Gradient> gradients, double* maxima, void* workspace);

Plan plan_rotate(std::span<const Problem<float>> problems, Rotation rotation,
                 const float* const* inputs, float* const* outputs, const Products& products,
                 void* workspace);

Plan plan_adam_update(std::span<const Problem<float>> problems, const Options& options,
                      const DeviceInputs& inputs, float* const* updates, void* workspace);

// Where the step is skipped the updates are undefined if a library has products of them.
Plan plan_orthogonalize(std::span<const Problem<float>> problems, const Options& options,
                        const DeviceInputs& inputs, const Products& products, float* const* updates,
                        void* workspace);

Plan plan_apply_update(std::span<const Problem<float>> problems, const Options& options,
                       const DeviceInputs& inputs, const float* const* updates, void* workspace);

Plan plan_factor_update(std::span<const Problem<float>> problems, const Options& options,
                        const DeviceInputs& inputs, const Products& products, void* workspace);

// The step without initialisation and refreshes: what has factors has its bases already.
Plan plan_step(std::span<const Problem<float>> problems, const Options& options,
               const DeviceInputs& inputs, const Products& products, void* workspace);

// Whether a plan of plan_step serves a step of the same problems with these options: grad_scale
// alone may differ.
bool serves(const Plan& plan, const Options& options);

// Makes such a plan the next step's, with other gradients and rates.
void renew_step(Plan& plan, std::span<const Problem<float>> problems, const Options& options,
                const DeviceInputs& inputs);

// What plan_step takes of the workspace for a matrix, but for sums and vectors, which are small
// beside it, and the library's part, which all share.
int64_t step_workspace_bytes(const Problem<float>& p, const Options& options);

}  // namespace dykaf::cuda
