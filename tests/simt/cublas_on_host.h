// cuBLAS for the host executor: its functions by name, and what was asked of them.
#pragma once

#include <cstdint>
#include <vector>

namespace simt {

// A call of cublasGemmEx, or of cublasGemmBatchedEx with its count.
struct LibraryCall {
  bool is_batched;
  bool is_bfloat16;  // operands may be rounded to it
  int m;
  int n;
  int k;
  int count;
};
std::vector<LibraryCall>& library_calls();

void* find_cublas_on_host(const char* name);

}  // namespace simt
