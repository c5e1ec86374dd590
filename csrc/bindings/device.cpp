#include "bindings/device.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <atomic>
#include <stdexcept>

#include "bindings/problems.h"

#if defined(DYKAF_WITH_CUDA) && !defined(DYKAF_SIMT)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace dykaf::bindings {

namespace {

std::atomic<bool> aten_alone = false;

}  // namespace

Backend backend_of(const std::string& name, const at::Tensor& tensor) {
  if (tensor.is_meta()) fail(name, "a dense tensor with memory", describe(tensor));
  if (aten_alone) return Backend::kAten;
#if defined(DYKAF_SIMT)
  // The CUDA backend runs on the CPU.
  const bool is_gpu = tensor.device().is_cpu();
#else
  const bool is_gpu = tensor.device().is_cuda();
  if (tensor.device().is_cpu()) return Backend::kCpu;
#endif
#if defined(DYKAF_WITH_CUDA)
  if (is_gpu && tensor.scalar_type() != at::kDouble) return Backend::kCuda;
#else
  static_cast<void>(is_gpu);
#endif
  return Backend::kAten;
}

const char* name_of(Backend backend) {
  switch (backend) {
    case Backend::kCpu:
      return "cpu";
    case Backend::kCuda:
      return "cuda";
    case Backend::kAten:
      return "aten";
  }
  return "";
}

bool use_aten_alone(bool alone) { return aten_alone.exchange(alone); }
bool uses_aten_alone() { return aten_alone; }

#if defined(DYKAF_WITH_CUDA)

namespace {

cuda::Stream current_stream([[maybe_unused]] const at::Device& device) {
#if defined(DYKAF_SIMT)
  return nullptr;
#else
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
#endif
}

void check_launch(int error) {
  if (error == 0) return;
#if defined(DYKAF_SIMT)
  throw std::runtime_error("launch error " + std::to_string(error));
#else
  throw std::runtime_error(std::string("CUDA launch: ") +
                           cudaGetErrorString(static_cast<cudaError_t>(error)));
#endif
}

}  // namespace

// Through pinned memory, so that the copy does not wait; torch keeps the memory until it is done.
at::Tensor copy_to_device(const std::vector<std::byte>& image, const at::Device& device) {
  const auto size = static_cast<int64_t>(image.size());
  at::Tensor host =
      at::empty({size}, at::TensorOptions().dtype(at::kByte).pinned_memory(device.is_cuda()));
  std::copy(image.begin(), image.end(), static_cast<std::byte*>(host.mutable_data_ptr()));
  return host.to(device, /*non_blocking=*/true, /*copy=*/true);
}

void launch_plan(const cuda::Plan& plan, const at::Tensor& image) {
  check_launch(plan.run(image.const_data_ptr(), current_stream(image.device())));
}

void run_plan(const at::Device& device, const std::function<cuda::Plan(void*)>& make_plan) {
  const c10::DeviceGuard guard(device);
  const at::Tensor workspace = at::empty({make_plan(nullptr).workspace_bytes},
                                         at::TensorOptions().dtype(at::kByte).device(device));
  const cuda::Plan plan = make_plan(workspace.mutable_data_ptr());
  launch_plan(plan, copy_to_device(plan.image, device));
}

#endif

}  // namespace dykaf::bindings
