// cuBLAS by its C functions, declared here, since a machine that builds this needs no header of it:
// torch brings the library. The numbers are those of cublas_api.h and library_types.h, which keep
// them from one version to the next.
#include <mutex>
#include <stdexcept>
#include <string>

#include "dykaf/cuda_library.h"

namespace dykaf::cuda {
namespace {

constexpr int kSuccess = 0;        // CUBLAS_STATUS_SUCCESS
constexpr int kPlain = 0;          // CUBLAS_OP_N
constexpr int kTransposed = 1;     // CUBLAS_OP_T
constexpr int kFloat32 = 0;        // CUDA_R_32F
constexpr int kAnyAlgorithm = -1;  // CUBLAS_GEMM_DEFAULT
// Sums in float32 of operands that may be rounded, to bfloat16 or TF32, or to TF32 alone.
constexpr int kFastBfloat16 = 75;  // CUBLAS_COMPUTE_32F_FAST_16BF
constexpr int kFastTf32 = 77;      // CUBLAS_COMPUTE_32F_FAST_TF32

using Handle = void*;  // a cublasHandle_t

struct Functions {
  int (*create)(Handle*);
  int (*set_stream)(Handle, Stream);
  int (*set_workspace)(Handle, void*, size_t);
  int (*gemm)(Handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* A,
              int a_type, int lda, const void* B, int b_type, int ldb, const void* beta, void* C,
              int c_type, int ldc, int compute_type, int algorithm);
  int (*gemm_batched)(Handle, int transa, int transb, int m, int n, int k, const void* alpha,
                      const void* const* A, int a_type, int lda, const void* const* B, int b_type,
                      int ldb, const void* beta, void* const* C, int c_type, int ldc, int count,
                      int compute_type, int algorithm);

  // Whether all were found.
  bool find(FindSymbol find_symbol) {
    const auto set = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(find_symbol(name));
      return function != nullptr;
    };
    return set(create, "cublasCreate_v2") && set(set_stream, "cublasSetStream_v2") &&
           set(set_workspace, "cublasSetWorkspace_v2") && set(gemm, "cublasGemmEx") &&
           set(gemm_batched, "cublasGemmBatchedEx");
  }
};

void check(const char* what, int status) {
  if (status == kSuccess) return;
  throw std::runtime_error(std::string(what) + ": cuBLAS returned status " +
                           std::to_string(status));
}

class Cublas : public Library {
 public:
  explicit Cublas(const Functions& functions) : functions_(functions) {
    check("cublasCreate", functions_.create(&handle_));
  }

  void multiply(const BlasBatch& batch, Stream stream) override {
    const float one = 1;
    const float zero = 0;
    const int transa = batch.transpose_a ? kTransposed : kPlain;
    const int transb = batch.transpose_b ? kTransposed : kPlain;
    const int compute = batch.precision == MatmulPrecision::kMedium ? kFastBfloat16 : kFastTf32;
    // The handle holds stream and workspace, and a new stream takes the workspace away.
    const std::lock_guard lock(mutex_);
    check("cublasSetStream", functions_.set_stream(handle_, stream));
    check("cublasSetWorkspace",
          functions_.set_workspace(handle_, batch.workspace, size_t{kLibraryWorkspaceBytes}));
    if (batch.count == 1) {
      check("cublasGemmEx",
            functions_.gemm(handle_, transa, transb, batch.m, batch.n, batch.k, &one, batch.first_a,
                            kFloat32, batch.lda, batch.first_b, kFloat32, batch.ldb, &zero,
                            batch.first_d, kFloat32, batch.ldd, compute, kAnyAlgorithm));
      return;
    }
    check(
        "cublasGemmBatchedEx",
        functions_.gemm_batched(handle_, transa, transb, batch.m, batch.n, batch.k, &one,
                                reinterpret_cast<const void* const*>(batch.A), kFloat32, batch.lda,
                                reinterpret_cast<const void* const*>(batch.B), kFloat32, batch.ldb,
                                &zero, reinterpret_cast<void* const*>(batch.D), kFloat32, batch.ldd,
                                batch.count, compute, kAnyAlgorithm));
  }

 private:
  Functions functions_;
  Handle handle_ = nullptr;  // for the life of the process: CUDA may end before it could be freed
  std::mutex mutex_;
};

}  // namespace

std::unique_ptr<Library> make_cublas(FindSymbol find) {
  Functions functions{};
  return functions.find(find) ? std::make_unique<Cublas>(functions) : nullptr;
}

}  // namespace dykaf::cuda
