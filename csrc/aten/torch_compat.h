// What differs between the versions of torch: nothing else in csrc asks for the version.
#pragma once

#include <ATen/Context.h>
#include <ATen/cpu/Utils.h>
#include <torch/version.h>

#define DYKAF_TORCH_FROM(major, minor) \
  (TORCH_VERSION_MAJOR > (major) ||    \
   (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR >= (minor)))

namespace dykaf::aten {

// How torch rounds the float32 operands of products.
enum class OperandRounding { kNone, kTf32, kBfloat16 };

namespace detail {

#if DYKAF_TORCH_FROM(2, 10)
inline OperandRounding rounding(at::Float32Backend backend) {
  const auto precision = at::globalContext().float32Precision(backend, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32   ? OperandRounding::kTf32
         : precision == at::Float32Precision::BF16 ? OperandRounding::kBfloat16
                                                   : OperandRounding::kNone;
}
#elif DYKAF_TORCH_FROM(2, 9)  // the same by names
inline OperandRounding rounding(const char* backend) {
  const auto precision = at::globalContext().float32Precision(backend, "matmul");
  return precision == "tf32"   ? OperandRounding::kTf32
         : precision == "bf16" ? OperandRounding::kBfloat16
                               : OperandRounding::kNone;
}
#endif

}  // namespace detail

// Of products on the CPU, where oneDNN can.
inline OperandRounding cpu_operand_rounding() {
#if DYKAF_TORCH_FROM(2, 10)
  return detail::rounding(at::Float32Backend::MKLDNN);
#elif DYKAF_TORCH_FROM(2, 9)
  return detail::rounding("mkldnn");
#else
  const auto precision = at::globalContext().float32MatmulPrecision();
  return precision == at::Float32MatmulPrecision::HIGH     ? OperandRounding::kTf32
         : precision == at::Float32MatmulPrecision::MEDIUM ? OperandRounding::kBfloat16
                                                           : OperandRounding::kNone;
#endif
}

// Of products on a GPU.
inline OperandRounding cuda_operand_rounding() {
#if DYKAF_TORCH_FROM(2, 10)
  return detail::rounding(at::Float32Backend::CUDA);
#elif DYKAF_TORCH_FROM(2, 9)
  return detail::rounding("cuda");
#else
  return at::globalContext().allowTF32CuBLAS() ? OperandRounding::kTf32 : OperandRounding::kNone;
#endif
}

// Whether this CPU multiplies bfloat16 (AVX-512).
inline bool cpu_multiplies_bfloat16() {
#if DYKAF_TORCH_FROM(2, 11)
  const auto capabilities = at::cpu::get_cpu_capabilities();
  const auto found = capabilities.find("avx512_bf16");
  return found != capabilities.end() && found->second.isBool() && found->second.toBool();
#else
  return at::cpu::is_avx512_bf16_supported();
#endif
}

}  // namespace dykaf::aten
