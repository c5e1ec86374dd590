// Planning of the grouped matrix multiplications.
#pragma once

#include <array>

#include "cuda/kernels/gemm.h"
#include "cuda/plan/plan_builder.h"

namespace dykaf::cuda {

// The block shape that serves a multiplication.
TileClass choose_tile(GemmForm form, int64_t m, int64_t n);

// The matrix multiplications of one launch site: one grid per block shape that occurs.
class GemmSite {
 public:
  explicit GemmSite(GemmForm form) : form_(form) {}

  // Adds a multiplication; gives it `partials` if its epilogue leaves sums. Returns it as it will
  // run.
  GemmProblem add(GemmProblem problem, PlanBuilder& builder);

  GemmForm form() const { return form_; }
  const std::vector<GemmProblem>& problems(TileClass tile_class) const {
    return problems_[static_cast<size_t>(tile_class)];
  }

  // The number of rows of the problem's partials.
  int32_t num_partials(const GemmProblem& problem) const;

 private:
  GemmForm form_;
  std::array<std::vector<GemmProblem>, kNumTileClasses> problems_;
};

}  // namespace dykaf::cuda
