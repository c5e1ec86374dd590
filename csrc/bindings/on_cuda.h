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
  std::optional<at::Tensor> lr = {};         // float32 [1], in place of options.lr
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

// The step of a group, in the parts of dykaf/ops.h's Step.
class CudaStep {
 public:
  CudaStep(const CudaGroup& group, Refreshes refreshes);

  // What plan() takes.
  int64_t workspace_bytes() const { return workspace_bytes_; }
  // Everything else that the step needs on the device, but for the refreshes.
  void plan(void* workspace);

  bool has_fresh() const { return !places_.fresh.empty(); }
  // Waits for the device.
  void initialize_();
  void reset_();

  // Waits for nothing. Where a refresh cannot be done the old bases stay.
  StepReport run_();

 private:
  struct Pass {
    std::vector<Problem<float>> problems;
    at::Tensor grad_max;
    cuda::Plan plan;
    at::Tensor image;
  };
  CudaGroup group_of(Pass& pass) const;

  CudaGroup group_;
  Refreshes refreshes_;
  cuda::Products products_;
  StepPlaces places_;
  std::list<Pass> passes_;
  int64_t workspace_bytes_ = 0;
};

}  // namespace dykaf::bindings
