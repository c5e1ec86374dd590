// The float32 matmul precision of torch on the CPU, set while the object lives.
#pragma once

#include <ATen/Context.h>

#include <optional>
#include <string>

namespace dykaf::cpu {

class MatmulPrecision {
 public:
  // "highest", "high" or "medium", as torch.set_float32_matmul_precision; nothing: torch's own.
  // Only the setting that this backend's products read is touched: the one for all backends refuses
  // to be read when they differ.
  explicit MatmulPrecision(const std::optional<std::string>& precision) {
    if (!precision) return;
    const auto wanted = *precision == "highest" ? at::Float32Precision::IEEE
                        : *precision == "high"  ? at::Float32Precision::TF32
                                                : at::Float32Precision::BF16;
    const auto in_effect = get();
    if (in_effect == wanted) return;
    // What is inherited from a setting for more must be left to follow it.
    set(at::Float32Precision::NONE);
    previous_ = get() == in_effect ? at::Float32Precision::NONE : in_effect;
    set(wanted);
  }
  ~MatmulPrecision() {
    if (previous_) set(*previous_);
  }
  MatmulPrecision(const MatmulPrecision&) = delete;
  MatmulPrecision& operator=(const MatmulPrecision&) = delete;

 private:
  static constexpr auto kBackend = at::Float32Backend::MKLDNN;
  static constexpr auto kOp = at::Float32Op::MATMUL;

  at::Float32Precision get() const { return at::globalContext().float32Precision(kBackend, kOp); }

  void set(at::Float32Precision precision) {
    at::globalContext().setFloat32Precision(kBackend, kOp, precision);
  }

  std::optional<at::Float32Precision> previous_;
};

}  // namespace dykaf::cpu
