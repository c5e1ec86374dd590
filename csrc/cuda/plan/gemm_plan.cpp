#include "cuda/plan/gemm_plan.h"

#include <algorithm>

namespace dykaf::cuda {
namespace {

// At or below this a side is served by the narrow block shapes.
constexpr int64_t kNarrowSide = 32;
// Large blocks are worth it from this on; below, medium ones keep more multiprocessors busy.
constexpr int64_t kLargeSide = 768;

bool leaves_sums(Epilogue epilogue) {
  return epilogue == Epilogue::kAdam || epilogue == Epilogue::kSums ||
         epilogue == Epilogue::kInner || epilogue == Epilogue::kLastQuintic;
}

// Whether an element kernel can do it with the product at D.
bool can_follow(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::kStore:
    case Epilogue::kAdam:
    case Epilogue::kParameter:
    case Epilogue::kQuintic:
    case Epilogue::kLastQuintic:
      return true;
    case Epilogue::kSums:
    case Epilogue::kInner:
    case Epilogue::kQuadratic:
      return false;
  }
  return false;
}

}  // namespace

TileClass choose_tile(GemmForm form, int64_t m, int64_t n) {
  const bool symmetric = is_symmetric(form);
  if (m >= kLargeSide && n >= kLargeSide) return TileClass::kLarge;
  if (!symmetric && m <= kNarrowSide) return TileClass::kWide;
  if (!symmetric && n <= kNarrowSide) return TileClass::kTall;
  return TileClass::kMedium;
}

EpilogueSums GemmSite::add(GemmProblem problem, PlanBuilder& builder) {
  if (can_follow(problem.epilogue) &&
      products_->are_by_library(form_, problem.m, problem.n, problem.k)) {
    return add_by_library(problem, builder);
  }
  const TileClass tile_class = choose_tile(form_, problem.m, problem.n);
  const auto num = static_cast<int32_t>(num_tiles(tile_class, form_, problem.m, problem.n));
  if (leaves_sums(problem.epilogue)) {
    problem.partials = builder.take<double>(int64_t{num} * kNumSums);
  }
  problems_[static_cast<size_t>(tile_class)].push_back(problem);
  return {problem.partials, num, kNumSums};
}

EpilogueSums GemmSite::add_by_library(const GemmProblem& p, PlanBuilder& builder) {
  BlasBatch batch = column_major(form_, p.m, p.n, p.k);
  batch.precision = products_->precision;
  auto place = std::find_if(by_library_.begin(), by_library_.end(), [&](const auto& other) {
    return other.batch.m == batch.m && other.batch.n == batch.n && other.batch.k == batch.k;
  });
  if (place == by_library_.end()) {
    place = by_library_.insert(place, LibraryProducts{batch, {}, {}, {}});
  }
  // BLAS's first operand is the second one here.
  place->A.push_back(p.B);
  place->B.push_back(p.A);
  place->D.push_back(p.D);

  const ElementArray row{1, int64_t{p.m} * p.n, p.matrix_idx, /*tile_begin=*/0};
  if (p.epilogue == Epilogue::kStore) return {};
  if (p.epilogue == Epilogue::kParameter) {
    applies_.push_back({row, p.D});
    return {};
  }
  const auto num = static_cast<int32_t>(element_tiles(row.m, row.n));
  auto* partials = builder.take<double>(num);
  if (p.epilogue == Epilogue::kAdam) {
    adams_.push_back({row, p.D, p.update, partials});
  } else {
    quintics_.push_back({row, p.C, p.D, p.bound, p.epilogue == Epilogue::kLastQuintic, partials});
  }
  return {partials, num, /*stride=*/1};
}

}  // namespace dykaf::cuda
