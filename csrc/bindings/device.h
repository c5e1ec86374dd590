// Which backend serves a tensor, and how plans of the CUDA backend run.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <functional>
#include <string>

#include "dykaf/cuda_ops.h"

namespace dykaf::bindings {

enum class Backend { kCpu, kCuda, kAten };

// What is computed while it lives does not depend on autograd, autocast or inference mode.
class Apart {
 private:
  c10::InferenceMode no_inference_{false};  // first, for it lets autograd in again
  at::AutoDispatchBelowADInplaceOrView no_autograd_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

// The backend for the state or gradient called `name`; raises ValueError for a tensor without
// memory.
Backend backend_of(const std::string& name, const at::Tensor& tensor);

// "cpu", "cuda" or "aten".
const char* name_of(Backend backend);

// From now on torch's own operations serve all tensors, or again what is fastest for each; returns
// the choice before.
bool use_aten_alone(bool alone);
bool uses_aten_alone();

// Allocates workspace on `device`, makes the plan there and launches it on the current stream.
// Raises RuntimeError with CUDA's message if a launch fails.
void run_plan(const at::Device& device, const std::function<cuda::Plan(void*)>& make_plan);

// The two halves of it: what the launches read, and the launches, on the current device.
at::Tensor copy_to_device(const std::vector<std::byte>& image, const at::Device& device);
void launch_plan(const cuda::Plan& plan, const at::Tensor& image);

}  // namespace dykaf::bindings
