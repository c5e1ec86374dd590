// Which backend serves a device, and how plans of the CUDA backend run there.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>

#include "dykaf/cuda_ops.h"

namespace dykaf::bindings {

enum class Backend { kCpu, kCuda };

// The backend for the tensor called `name`; raises ValueError where this build has none for it.
Backend backend_of(const std::string& name, const at::Tensor& tensor);

// A tensor over device memory that it does not own.
at::Tensor device_view(const float* data, at::IntArrayRef shape, const at::Device& device);

// Allocates workspace on `device`, makes the plan there and launches it on the current stream.
// Raises RuntimeError with CUDA's message if a launch fails.
void run_plan(const at::Device& device, const std::function<cuda::Plan(void*)>& make_plan);

}  // namespace dykaf::bindings
