// Which backend serves a device, and how plans of the CUDA backend run there.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <functional>
#include <string>

#include "dykaf/cuda_ops.h"

namespace dykaf::bindings {

enum class Backend { kCpu, kCuda };

// What is computed while it lives does not depend on autograd, autocast or inference mode.
class Apart {
 private:
  c10::InferenceMode no_inference_{false};  // first, for it lets autograd in again
  at::AutoDispatchBelowADInplaceOrView no_autograd_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

// The backend for the tensor called `name`; raises ValueError where this build has none for it.
Backend backend_of(const std::string& name, const at::Tensor& tensor);

// A tensor over device memory that it does not own.
at::Tensor device_view(const float* data, at::IntArrayRef shape, const at::Device& device);

// Allocates workspace on `device`, makes the plan there and launches it on the current stream.
// Raises RuntimeError with CUDA's message if a launch fails.
void run_plan(const at::Device& device, const std::function<cuda::Plan(void*)>& make_plan);

// The two halves of it: what the launches read, and the launches, on the current device.
at::Tensor copy_to_device(const std::vector<std::byte>& image, const at::Device& device);
void launch_plan(const cuda::Plan& plan, const at::Tensor& image);

}  // namespace dykaf::bindings
