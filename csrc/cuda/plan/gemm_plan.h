// Planning of the matrix multiplications of a launch site.
#pragma once

#include <array>

#include "cuda/kernels/elements.h"
#include "cuda/kernels/gemm.h"
#include "cuda/plan/plan_builder.h"

namespace dykaf::cuda {

// The block shape that serves a multiplication.
TileClass choose_tile(GemmForm form, int64_t m, int64_t n);

// Where the epilogue of a multiplication leaves its sums, of which there may be several in a row.
struct EpilogueSums {
  double* partials;  // [num, stride]
  int32_t num;
  int32_t stride;
};

// What the library computes in one call: products of one shape.
struct LibraryProducts {
  BlasBatch batch;  // without pointers
  std::vector<const float*> A;
  std::vector<const float*> B;
  std::vector<float*> D;
};

// The matrix multiplications of one launch site: one grid per block shape that occurs, a call of
// the library per shape that goes there, and after these a launch per kind of their epilogues.
class GemmSite {
 public:
  // `products` must outlive the site.
  GemmSite(GemmForm form, const Products& products) : form_(form), products_(&products) {}

  // Adds a multiplication; gives it room for sums if its epilogue leaves some. A parameter's update
  // needs a place at D, for the library stores products.
  EpilogueSums add(GemmProblem problem, PlanBuilder& builder);

  GemmForm form() const { return form_; }
  const Products& products() const { return *products_; }
  const std::vector<GemmProblem>& problems(TileClass tile_class) const {
    return problems_[static_cast<size_t>(tile_class)];
  }
  const std::vector<LibraryProducts>& by_library() const { return by_library_; }
  const std::vector<AdamProblem>& adams() const { return adams_; }
  const std::vector<ApplyProblem>& applies() const { return applies_; }
  const std::vector<QuinticProblem>& quintics() const { return quintics_; }

 private:
  EpilogueSums add_by_library(const GemmProblem& problem, PlanBuilder& builder);

  GemmForm form_;
  const Products* products_;
  std::array<std::vector<GemmProblem>, kNumTileClasses> problems_;
  std::vector<LibraryProducts> by_library_;
  std::vector<AdamProblem> adams_;
  std::vector<ApplyProblem> applies_;
  std::vector<QuinticProblem> quintics_;
};

}  // namespace dykaf::cuda
