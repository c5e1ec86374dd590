// The names that kernels are written against beside plain CUDA: inlining, shared memory, launches.
// Under nvcc they are given here. A host executor that runs kernels on a CPU provides its own
// before this file is read, and defines DYKAF_SIMT.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define DYKAF_DEVICE __device__ __forceinline__
#define DYKAF_SHARED(type, name, dims) __shared__ __align__(16) type name dims
#define DYKAF_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define DYKAF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::dykaf::cuda::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace dykaf::cuda {

// What a block may use without asking.
inline constexpr size_t kDefaultSharedBytes = 48 * 1024;

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Args... args) {
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
  return cudaGetLastError();
}

struct ReuseTag {};
inline constexpr ReuseTag kReuse;

// Hands out the dynamic shared memory of a block in pieces of 16 bytes.
class SharedCarver {
 public:
  DYKAF_DEVICE explicit SharedCarver(unsigned char* base) : base_(base) {}
  // A second division of memory that is in use: between barriers.
  DYKAF_DEVICE SharedCarver(unsigned char* base, ReuseTag) : base_(base) {}

  template <typename T>
  DYKAF_DEVICE T* take(int count) {
    unsigned char* piece = base_ + offset_;
    offset_ += (static_cast<uint32_t>(count) * sizeof(T) + 15u) & ~15u;
    return reinterpret_cast<T*>(piece);
  }

 private:
  unsigned char* base_;
  uint32_t offset_ = 0;
};

}  // namespace dykaf::cuda

#elif defined(DYKAF_SIMT)

#define DYKAF_DEVICE inline

#else
#error "CUDA sources need nvcc or a host executor"
#endif
