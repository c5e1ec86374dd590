// The float32 matmul precision of ATen, set while the object lives.
#pragma once

#include <ATen/Context.h>

#include <optional>
#include <string>

namespace dykaf::cpu {

class MatmulPrecision {
 public:
  // "highest", "high" or "medium", as torch.set_float32_matmul_precision; nothing: torch's own.
  explicit MatmulPrecision(const std::optional<std::string>& precision) {
    if (!precision) return;
    previous_ = at::globalContext().float32MatmulPrecision();
    at::globalContext().setFloat32MatmulPrecision(*precision);
  }
  ~MatmulPrecision() {
    if (previous_) at::globalContext().setFloat32MatmulPrecision(name(*previous_));
  }
  MatmulPrecision(const MatmulPrecision&) = delete;
  MatmulPrecision& operator=(const MatmulPrecision&) = delete;

 private:
  static const char* name(at::Float32MatmulPrecision precision) {
    switch (precision) {
      case at::Float32MatmulPrecision::MEDIUM:
        return "medium";
      case at::Float32MatmulPrecision::HIGH:
        return "high";
      default:
        return "highest";
    }
  }

  std::optional<at::Float32MatmulPrecision> previous_;
};

}  // namespace dykaf::cpu
