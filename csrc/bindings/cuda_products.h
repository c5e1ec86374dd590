// By what a GPU computes products: the rule that holds, and cuBLAS as torch has loaded it.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "dykaf/cuda_ops.h"

namespace dykaf::bindings {

// A rule for GPUs of compute capability `least` to `most`, each 10 major + minor.
struct CapabilityRule {
  cuda::SizeRange capability;
  cuda::ProductRule rule;
};

// Plans that are made from now on follow these rules, the first that fits.
void use_product_rules(std::vector<CapabilityRule> rules);

// Whether there is a cuBLAS that can be called.
bool has_library();

#if defined(DYKAF_WITH_CUDA)
// Products at `precision` on the device. The first call of a process for which a rule fits starts
// the library there.
cuda::Products products_on(const at::Device& device, MatmulPrecision precision);
#endif

#if defined(DYKAF_SIMT)
// tests/simt/cublas_on_host.cpp
void* find_cublas(const char* name);
#endif

}  // namespace dykaf::bindings
