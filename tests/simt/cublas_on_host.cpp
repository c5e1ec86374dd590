// Stands in for cuBLAS: the C functions that csrc/cuda/library/cublas.cpp calls, in plain loops
// over matrices stored by columns. Operands are rounded to nearest, as the kernels here do it;
// cuBLAS may truncate them, or keep more. Arguments that cuBLAS refuses are refused.
#include "cublas_on_host.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <string>

#include "dykaf/cuda_library.h"
#include "dykaf/rounding.h"

namespace simt {
namespace {

constexpr int kSuccess = 0;
constexpr int kInvalidValue = 7;
constexpr int kNotSupported = 15;

// cuBLAS wants 256, which torch's memory on a GPU has; this is what it has on a CPU.
constexpr uintptr_t kAlignment = 64;

struct Context {
  bool has_stream = false;
  void* workspace = nullptr;
};

enum class Operands { kTf32, kBfloat16 };

// 10 bits of the fraction are left, ties away from zero.
float round_tf32(float x) {
  return std::bit_cast<float>((std::bit_cast<uint32_t>(x) + 0x1000u) & ~uint32_t{0x1fff});
}

float rounded(float x, Operands operands) {
  return operands == Operands::kTf32 ? round_tf32(x)
                                     : dykaf::bfloat16_to_float(dykaf::nearest_bfloat16(x));
}

int create(void** handle) {
  *handle = new Context();
  return kSuccess;
}

// The workspace is the library's own again, in which a graph's capture would allocate.
int set_stream(void* handle, void*) {
  auto* context = static_cast<Context*>(handle);
  context->has_stream = true;
  context->workspace = nullptr;
  return kSuccess;
}

int set_workspace(void* handle, void* workspace, size_t bytes) {
  if (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % kAlignment != 0 ||
      bytes != size_t{dykaf::cuda::kLibraryWorkspaceBytes}) {
    return kInvalidValue;
  }
  static_cast<Context*>(handle)->workspace = workspace;
  return kSuccess;
}

// What gemm and gemm_batched have in common.
struct Sizes {
  bool transpose_a;
  bool transpose_b;
  int m;
  int n;
  int k;
  int lda;
  int ldb;
  int ldc;
  float alpha;
  float beta;
  Operands operands;
};

void multiply(const Sizes& s, const float* A, const float* B, float* C) {
  for (int j = 0; j < s.n; ++j) {
    for (int i = 0; i < s.m; ++i) {
      double sum = 0;
      for (int64_t p = 0; p < s.k; ++p) {
        const float a = s.transpose_a ? A[int64_t{i} * s.lda + p] : A[p * s.lda + i];
        const float b = s.transpose_b ? B[p * s.ldb + j] : B[int64_t{j} * s.ldb + p];
        sum += double{rounded(a, s.operands)} * double{rounded(b, s.operands)};
      }
      float& c = C[int64_t{j} * s.ldc + i];
      c = static_cast<float>(s.alpha * sum + (s.beta == 0 ? 0.0 : double{s.beta} * double{c}));
    }
  }
}

// Reads the arguments; a status that is not kSuccess says what is wrong with them.
int read(Sizes& s, const Context& context, int transa, int transb, int m, int n, int k,
         const void* alpha, int a_type, int lda, int b_type, int ldb, const void* beta, int c_type,
         int ldc, int compute_type, int algorithm) {
  if (!context.has_stream || context.workspace == nullptr) return kInvalidValue;
  if (transa < 0 || transa > 1 || transb < 0 || transb > 1) return kInvalidValue;
  if (a_type != 0 || b_type != 0 || c_type != 0 || algorithm != -1) return kNotSupported;
  if (compute_type != 75 && compute_type != 77) return kNotSupported;
  s = {transa == 1,
       transb == 1,
       m,
       n,
       k,
       lda,
       ldb,
       ldc,
       0,
       0,
       compute_type == 75 ? Operands::kBfloat16 : Operands::kTf32};
  if (m < 0 || n < 0 || k < 0 || lda < std::max(1, s.transpose_a ? k : m) ||
      ldb < std::max(1, s.transpose_b ? n : k) || ldc < std::max(1, m)) {
    return kInvalidValue;
  }
  std::memcpy(&s.alpha, alpha, sizeof s.alpha);
  std::memcpy(&s.beta, beta, sizeof s.beta);
  // As a kernel that splits k would.
  constexpr size_t kPart = 4096;
  auto* workspace = static_cast<std::byte*>(context.workspace);
  std::memset(workspace, 0x77, kPart);
  std::memset(workspace + dykaf::cuda::kLibraryWorkspaceBytes - kPart, 0x77, kPart);
  return kSuccess;
}

int gemm(void* handle, int transa, int transb, int m, int n, int k, const void* alpha,
         const void* A, int a_type, int lda, const void* B, int b_type, int ldb, const void* beta,
         void* C, int c_type, int ldc, int compute_type, int algorithm) {
  Sizes s{};
  const int status = read(s, *static_cast<Context*>(handle), transa, transb, m, n, k, alpha, a_type,
                          lda, b_type, ldb, beta, c_type, ldc, compute_type, algorithm);
  if (status != kSuccess) return status;
  library_calls().push_back({false, compute_type == 75, m, n, k, 1});
  multiply(s, static_cast<const float*>(A), static_cast<const float*>(B), static_cast<float*>(C));
  return kSuccess;
}

int gemm_batched(void* handle, int transa, int transb, int m, int n, int k, const void* alpha,
                 const void* const* A, int a_type, int lda, const void* const* B, int b_type,
                 int ldb, const void* beta, void* const* C, int c_type, int ldc, int count,
                 int compute_type, int algorithm) {
  Sizes s{};
  const int status = read(s, *static_cast<Context*>(handle), transa, transb, m, n, k, alpha, a_type,
                          lda, b_type, ldb, beta, c_type, ldc, compute_type, algorithm);
  if (status != kSuccess) return status;
  library_calls().push_back({true, compute_type == 75, m, n, k, count});
  for (int i = 0; i < count; ++i) {
    multiply(s, static_cast<const float*>(A[i]), static_cast<const float*>(B[i]),
             static_cast<float*>(C[i]));
  }
  return kSuccess;
}

template <typename Function>
void* address(Function* function) {
  return reinterpret_cast<void*>(function);
}

}  // namespace

std::vector<LibraryCall>& library_calls() {
  static std::vector<LibraryCall> calls;
  return calls;
}

void* find_cublas_on_host(const char* name) {
  static const std::map<std::string, void*> functions = {
      {"cublasCreate_v2", address(create)},
      {"cublasSetStream_v2", address(set_stream)},
      {"cublasSetWorkspace_v2", address(set_workspace)},
      {"cublasGemmEx", address(gemm)},
      {"cublasGemmBatchedEx", address(gemm_batched)},
  };
  const auto found = functions.find(name);
  return found != functions.end() ? found->second : nullptr;
}

}  // namespace simt

// What csrc/bindings/cuda_products.h asks for.
namespace dykaf::bindings {

void* find_cublas(const char* name);
void* find_cublas(const char* name) { return simt::find_cublas_on_host(name); }

}  // namespace dykaf::bindings
