#include "bindings/cuda_products.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#if defined(DYKAF_WITH_CUDA) && !defined(DYKAF_SIMT)
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#endif

namespace dykaf::bindings {
namespace {

using Rules = std::vector<CapabilityRule>;

std::mutex mutex;
Rules rules;

#if defined(DYKAF_WITH_CUDA)

#if defined(DYKAF_SIMT)

int64_t capability_of(const at::Device&) { return 90; }

std::unique_ptr<cuda::Library> start_library(const at::Device&) {
  return cuda::make_cublas(&find_cublas);
}

#else

int64_t capability_of(const at::Device& device) {
  int major = 0;
  int minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()));
  return 10 * int64_t{major} + minor;
}

// In the library that torch has loaded, by its name alone: another one is never loaded.
void* find_cublas(const char* name) {
  static void* const library = [] {
    const std::string file = "libcublas.so." + std::to_string(CUDART_VERSION / 1000);
    return dlopen(file.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  }();
  return library != nullptr ? dlsym(library, name) : nullptr;
}

std::unique_ptr<cuda::Library> start_library(const at::Device& device) {
  const c10::DeviceGuard guard(device);
  // It allocates, which ends the capture of a graph that does not allow for it.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  return cuda::make_cublas(&find_cublas);
}

#endif

// With `mutex` held.
cuda::Library* library_on(const at::Device& device) {
  // Kept for the life of the process: CUDA may end before it could be freed.
  static auto& libraries = *new std::map<at::DeviceIndex, std::unique_ptr<cuda::Library>>;
  const auto found = libraries.find(device.index());
  if (found != libraries.end()) return found->second.get();
  return (libraries[device.index()] = start_library(device)).get();
}

#endif

}  // namespace

void use_product_rules(Rules new_rules) {
  const std::lock_guard lock(mutex);
  rules = std::move(new_rules);
}

#if defined(DYKAF_WITH_CUDA)

bool has_library() { return find_cublas("cublasGemmBatchedEx") != nullptr; }

cuda::Products products_on(const at::Device& device, MatmulPrecision precision) {
  cuda::Products products{precision};
  if (precision == MatmulPrecision::kHighest) return products;
  const int64_t capability = capability_of(device);
  const std::lock_guard lock(mutex);
  for (const CapabilityRule& candidate : rules) {
    if (candidate.capability.has(capability) && candidate.rule.precision == precision) {
      products.rules.push_back(candidate.rule);
    }
  }
  if (!products.rules.empty()) products.library = library_on(device);
  return products;
}

#else

bool has_library() { return false; }

#endif

}  // namespace dykaf::bindings
