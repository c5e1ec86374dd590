#include "cuda/gemm_plan.h"
#include "cuda/gemm_tile.cuh"
#include "cuda/grouped.h"

namespace dykaf::cuda {
namespace {

// At or below this a side is served by the narrow block shapes.
constexpr int64_t kNarrowSide = 32;
// Large blocks are worth it from this on; below, medium ones keep more multiprocessors busy.
constexpr int64_t kLargeSide = 768;

template <class Tile>
int64_t tiles_of(ProductForm form, int64_t m, int64_t n) {
  const int64_t tiles_m = ceil_div(m, Tile::kM);
  const bool symmetric = form == ProductForm::kSymmetricNT || form == ProductForm::kSymmetricTN;
  return symmetric ? tiles_m * (tiles_m + 1) / 2 : tiles_m * ceil_div(n, Tile::kN);
}

bool leaves_sums(Epilogue epilogue) {
  return epilogue == Epilogue::kAdam || epilogue == Epilogue::kSums || epilogue == Epilogue::kInner;
}

}  // namespace

TileClass choose_tile(ProductForm form, int64_t m, int64_t n) {
  const bool symmetric = form == ProductForm::kSymmetricNT || form == ProductForm::kSymmetricTN;
  if (m >= kLargeSide && n >= kLargeSide) return TileClass::kLarge;
  if (!symmetric && m <= kNarrowSide) return TileClass::kWide;
  if (!symmetric && n <= kNarrowSide) return TileClass::kTall;
  return TileClass::kMedium;
}

int64_t num_tiles(TileClass tile_class, ProductForm form, int64_t m, int64_t n) {
  switch (tile_class) {
    case TileClass::kLarge:
      return tiles_of<LargeTile>(form, m, n);
    case TileClass::kMedium:
      return tiles_of<MediumTile>(form, m, n);
    case TileClass::kWide:
      return tiles_of<WideTile>(form, m, n);
    case TileClass::kTall:
      return tiles_of<TallTile>(form, m, n);
  }
  return 0;
}

int32_t Products::num_partials(const GemmProblem& problem) const {
  const TileClass tile_class = choose_tile(form_, problem.m, problem.n);
  return static_cast<int32_t>(num_tiles(tile_class, form_, problem.m, problem.n));
}

GemmProblem Products::add(GemmProblem problem, PlanBuilder& builder) {
  if (leaves_sums(problem.epilogue)) {
    problem.partials = builder.take<double>(int64_t{num_partials(problem)} * kNumSums);
  }
  const auto tile_class = static_cast<size_t>(choose_tile(form_, problem.m, problem.n));
  problems_[tile_class].push_back(problem);
  return problem;
}

void Products::launch(PlanBuilder& builder, size_t matrices_offset, const MatrixScalars* scalars,
                      MatmulPrecision precision) const {
  for (int i = 0; i < kNumTileClasses; ++i) {
    std::vector<GemmProblem> problems = problems_[static_cast<size_t>(i)];
    const auto tile_class = static_cast<TileClass>(i);
    const ProductForm form = form_;
    const int64_t grid = assign_tiles(problems, [&](const GemmProblem& problem) {
      return num_tiles(tile_class, form, problem.m, problem.n);
    });
    if (problems.empty()) continue;
    const size_t offset = builder.add(problems);
    const auto num = static_cast<int32_t>(problems.size());
    builder.launch([=](const std::byte* image, Stream stream) {
      const GemmLaunch launch{as<GemmProblem>(image + offset),
                              as<Problem<float>>(image + matrices_offset), scalars, num, grid};
      return launch_gemm(precision, form, tile_class, launch, stream);
    });
  }
}

int launch_gemm(MatmulPrecision precision, ProductForm form, TileClass tile_class,
                const GemmLaunch& launch, Stream stream) {
  switch (precision) {
    case MatmulPrecision::kHighest:
      return launch_gemm_highest(form, tile_class, launch, stream);
    case MatmulPrecision::kHigh:
      return launch_gemm_high(form, tile_class, launch, stream);
    case MatmulPrecision::kMedium:
      return launch_gemm_medium(form, tile_class, launch, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace dykaf::cuda
