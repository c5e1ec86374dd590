#include "cuda/plan/gemm_plan.h"

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

}  // namespace

TileClass choose_tile(GemmForm form, int64_t m, int64_t n) {
  const bool symmetric = is_symmetric(form);
  if (m >= kLargeSide && n >= kLargeSide) return TileClass::kLarge;
  if (!symmetric && m <= kNarrowSide) return TileClass::kWide;
  if (!symmetric && n <= kNarrowSide) return TileClass::kTall;
  return TileClass::kMedium;
}

int32_t GemmSite::num_partials(const GemmProblem& problem) const {
  const TileClass tile_class = choose_tile(form_, problem.m, problem.n);
  return static_cast<int32_t>(num_tiles(tile_class, form_, problem.m, problem.n));
}

GemmProblem GemmSite::add(GemmProblem problem, PlanBuilder& builder) {
  if (leaves_sums(problem.epilogue)) {
    problem.partials = builder.take<double>(int64_t{num_partials(problem)} * kNumSums);
  }
  const auto tile_class = static_cast<size_t>(choose_tile(form_, problem.m, problem.n));
  problems_[tile_class].push_back(problem);
  return problem;
}

}  // namespace dykaf::cuda
