// The operations on matrices whose tensors are on one device of the CUDA backend.
#pragma once

#include <list>
#include <optional>
#include <vector>

#include "bindings/device.h"
#include "bindings/problems.h"
#include "dykaf/ops.h"
#include "dykaf/schedule.h"

namespace dykaf::bindings {

// A list of matrices on a device, and what their operations need beside the group's options.
struct CudaGroup {
  std::span<const Problem<float>> problems;
  const Options& options;
  at::Device device;
  cuda::MatmulPrecision precision;
  std::optional<at::Tensor> grad_max = {};   // float64 [num_matrices]
  std::optional<at::Tensor> skip = {};       // int32 [1], not 0: change nothing
  std::optional<at::Tensor> amp_scale = {};  // float32 [1], GradScaler's
  std::optional<at::Tensor> lr = {};         // float32 [1], in place of every rate's
};

at::Tensor grad_max_on_cuda(std::span<const Gradient> gradients, const at::Device& device);

void rotate_on_cuda(const CudaGroup& group, Rotation rotation, const float* const* inputs,
                    float* const* outputs);
void adam_update_on_cuda_(const CudaGroup& group, float* const* updates);
void orthogonalize_on_cuda_(const CudaGroup& group, float* const* updates);
void apply_update_on_cuda_(const CudaGroup& group, const float* const* updates);
void factor_update_on_cuda_(const CudaGroup& group);

// Waits for the device: whether a matrix is initialised is for the host to know. Where it fails the
// matrices are as before.
void initialize_on_cuda_(const CudaGroup& group);

// As a matrix is before its first gradient.
void reset_on_cuda_(const CudaGroup& group, const Problem<float>& p);

// Where it cannot be done the old bases stay.
void refresh_basis_on_cuda_(const CudaGroup& group, Side side);

// Returns the places of matrices whose refresh could not be done.
std::vector<size_t> refresh_due_on_cuda_(const CudaGroup& group);

// The passes in which a step goes over a group, with their plans. They serve the next step of the
// same problems if that takes all of them.
struct CudaPasses {
  struct Pass {
    std::vector<size_t> indices;  // in the group
    std::vector<Problem<float>> problems;
    cuda::Plan plan;
    // Of one step.
    at::Tensor grad_max;
    at::Tensor image;
  };
  std::list<Pass> passes;
  cuda::Products products;
  int64_t workspace_bytes = 0;
  void* workspace = nullptr;  // where the plans have it; null: they have none
};

// The step of a group, in the parts of dykaf/ops.h's Step.
class CudaStep {
 public:
  // `passes`: of the step before, or new.
  CudaStep(const CudaGroup& group, Refreshes refreshes, CudaPasses& passes);

  // What plan() takes.
  int64_t workspace_bytes() const { return kept_.workspace_bytes; }
  // Everything else that the step needs on the device, but for the refreshes.
  void plan(void* workspace);

  bool has_fresh() const { return !places_.fresh.empty(); }
  // Waits for the device.
  void initialize_();
  void reset_();

  // Waits for nothing. Where a refresh cannot be done the old bases stay.
  StepReport run_();

 private:
  bool kept_serves() const;
  CudaGroup group_of(const CudaPasses::Pass& pass) const;

  CudaGroup group_;
  Refreshes refreshes_;
  cuda::Products products_;
  StepPlaces places_;
  CudaPasses& kept_;
};

}  // namespace dykaf::bindings
