// The operations on matrices whose tensors are on one device of the CUDA backend.
#pragma once

#include <optional>

#include "bindings/device.h"
#include "bindings/problems.h"
#include "cpu/matmul_precision.h"

namespace dykaf::bindings {

// A list of matrices on a device, and what their operations need beside the group's options.
struct DeviceGroup {
  std::span<const Problem<float>> problems;
  const Options& options;
  at::Device device;
  cuda::MatmulPrecision precision;
  std::optional<at::Tensor> grad_max = {};   // float64 [num_matrices]
  std::optional<at::Tensor> skip = {};       // int32 [1], not 0: change nothing
  std::optional<at::Tensor> amp_scale = {};  // float32 [1], GradScaler's
  std::optional<at::Tensor> lr = {};         // float32 [1], in place of options.lr
};

// Full precision of torch's products on a device while the object lives: on a GPU for this thread
// alone, so that no other thread meets a setting in between.
class FullPrecision {
 public:
  explicit FullPrecision(const at::Device& device)
      : on_host_(device.is_cuda() ? std::nullopt : std::optional<std::string>("highest")) {}

 private:
  at::NoTF32Guard on_gpu_;
  cpu::MatmulPrecision on_host_;
};

at::Tensor grad_max_on_device(std::span<const Gradient> gradients, const at::Device& device);

void rotate_on_device(const DeviceGroup& group, Rotation rotation, const float* const* inputs,
                      float* const* outputs);
void adam_update_on_device_(const DeviceGroup& group, float* const* updates);
void apply_update_on_device_(const DeviceGroup& group, const float* const* updates);
void factor_update_on_device_(const DeviceGroup& group);

// Waits for the device: whether a matrix is initialised is for the host to know.
void initialize_on_device_(const DeviceGroup& group);

void refresh_basis_on_device_(const DeviceGroup& group, Side side);

void refresh_due_on_device_(const DeviceGroup& group);

// Waits for the device while a matrix still awaits its first gradient, and not else.
void step_on_device_(const DeviceGroup& group, Refreshes refreshes);

}  // namespace dykaf::bindings
