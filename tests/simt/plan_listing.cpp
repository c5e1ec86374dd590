// Lists what csrc/cuda/plan launches in a step at the defaults: tests/test_cuda_bounds_plan.py. The
// kernels' launchers are stubs here, so no kernel is compiled.
//
// stdin: a line per matrix, "m n side skinny_rank rows_used", side "left", "right" or "none"
// (AdamW). stdout: a line per launch; of a product, its form, block, number of blocks, and a line
// for each multiplication. With an argument, a number, products whose sides are all as long go to a
// library, of whose calls form and sizes by columns are listed.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <list>
#include <string>
#include <type_traits>

#include "cuda/kernels/elements.h"
#include "cuda/kernels/factor_scalars.h"
#include "cuda/kernels/gemm.h"
#include "cuda/kernels/grad_max.h"
#include "cuda/kernels/prepare.h"
#include "cuda/kernels/second_moment.h"
#include "cuda/kernels/skinny.h"

namespace dykaf::cuda {

int launch_gemm_any(GemmForm form, TileClass tile_class, const GemmLaunch& launch) {
  constexpr std::array kForms = {"NN", "TN", "NT", "sym NT", "sym TN"};
  constexpr std::array kTiles = {"128x128", "64x64", "16x64", "64x16"};
  std::printf("gemm|%s|%s|%lld\n", kForms.at(static_cast<size_t>(form)),
              kTiles.at(static_cast<size_t>(tile_class)), static_cast<long long>(launch.grid));
  for (int i = 0; i < launch.num; ++i) {
    const GemmProblem& p = launch.problems[i];
    std::printf("  %d %d %d\n", p.m, p.n, p.k);
  }
  return 0;
}

int launch_gemm_highest(GemmForm form, TileClass tile_class, const GemmLaunch& launch, Stream) {
  return launch_gemm_any(form, tile_class, launch);
}
int launch_gemm_high(GemmForm form, TileClass tile_class, const GemmLaunch& launch, Stream) {
  return launch_gemm_any(form, tile_class, launch);
}
int launch_gemm_medium(GemmForm form, TileClass tile_class, const GemmLaunch& launch, Stream) {
  return launch_gemm_any(form, tile_class, launch);
}

int list(const char* name) { return std::printf("%s\n", name) < 0 ? 1 : 0; }

template <typename ElementProblem>
int launch_elements(const Grouped<ElementProblem>&, const Group&, Stream) {
  if constexpr (std::is_same_v<ElementProblem, LoadProblem>) return list("load");
  if constexpr (std::is_same_v<ElementProblem, AdamWProblem>) return list("adamw");
  if constexpr (std::is_same_v<ElementProblem, BeyondProblem>) return list("beyond");
  if constexpr (std::is_same_v<ElementProblem, NormalizeProblem>) return list("normalize");
  if constexpr (std::is_same_v<ElementProblem, AdamProblem>) return list("adam");
  if constexpr (std::is_same_v<ElementProblem, ApplyProblem>) return list("apply");
  if constexpr (std::is_same_v<ElementProblem, QuinticProblem>) return list("quintic");
  return list("other elements");
}
template int launch_elements(const Grouped<LoadProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<AdamProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<CompactAdamProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<ApplyProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<AdamWProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<BeyondProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<SquaresProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<NormalizeProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<QuinticProblem>&, const Group&, Stream);

int launch_prepare(const Group&, const Options&, const DeviceInputs&, StepCount, Stream) {
  return list("prepare");
}
int launch_blend(const Grouped<BlendProblem>&, const Group&, Stream) { return list("blend"); }
int launch_update_rms(const Grouped<RmsProblem>&, const Group&, Stream) {
  return list("update_rms");
}
int launch_factor_scalars(const Grouped<FactorProblem>&, const Group&, double, Stream) {
  return list("scalars");
}
int launch_skinny(SkinnyStage stage, const Grouped<SkinnyProblem>&, const Group&, double, Stream) {
  constexpr std::array kStages = {"skinny gradient", "skinny moments", "skinny long factor"};
  return list(kStages.at(static_cast<size_t>(stage)));
}
int launch_moment(MomentStage, const Grouped<MomentProblem>&, const Group&, double, Stream) {
  return list("moment");
}

// Sizes of grids that nothing is compared with.
int64_t element_tiles(int64_t, int64_t) { return 1; }
int64_t skinny_tiles(SkinnyStage, int64_t, int64_t) { return 1; }
int64_t skinny_pieces(int64_t) { return 1; }
int64_t moment_tiles(MomentStage, int64_t, int64_t) { return 1; }

}  // namespace dykaf::cuda

namespace {

using namespace dykaf;

class ListingLibrary : public cuda::Library {
 public:
  void multiply(const cuda::BlasBatch& batch, cuda::Stream) override {
    std::printf("library|%c%c|%d\n", batch.transpose_a ? 'T' : 'N', batch.transpose_b ? 'T' : 'N',
                batch.count);
    for (int i = 0; i < batch.count; ++i) {
      std::printf("  %d %d %d\n", batch.m, batch.n, batch.k);
    }
  }
};

// The rule is that of large sides.
cuda::Products products_from(int64_t least, cuda::Library& library) {
  cuda::Products products{MatmulPrecision::kHigh, &library};
  const cuda::SizeRange large{least, int64_t{1} << 31};
  for (const auto form : {cuda::GemmForm::kNN, cuda::GemmForm::kTN, cuda::GemmForm::kNT}) {
    products.rules.push_back({products.precision, form, large, large, large, /*by_library=*/true});
  }
  return products;
}

// A place that is never read.
template <typename T>
T* somewhere() {
  return reinterpret_cast<T*>(uintptr_t{256});
}

Problem<float> problem_of(int64_t m, int64_t n, const std::string& side, int64_t skinny_rank,
                          int64_t* rows) {
  Problem<float> p{};
  p.m = m;
  p.n = n;
  p.dtype = DType::kFloat32;
  p.exp_avg = p.exp_avg_sq = somewhere<float>();
  if (side == "none") return p;
  p.rho = somewhere<double>();
  if (side == "left") p.L = p.Q_L = somewhere<float>();
  if (side == "right") p.R = p.Q_R = somewhere<float>();
  p.skinny_rank = skinny_rank;
  if (skinny_rank > 0) p.basis = p.core = p.flat = somewhere<float>();
  p.rows = rows;
  return p;
}

}  // namespace

int main(int argc, char** argv) {
  ListingLibrary library;
  const cuda::Products products =
      argc > 1 ? products_from(std::atoll(argv[1]), library) : cuda::Products{};
  Options options{};
  options.second_moment = SecondMoment::kFull;
  options.integrator = Integrator::kDiagonal;
  options.nesterov = true;
  options.orthogonalize = 3;
  std::vector<Problem<float>> problems;
  std::list<std::array<int64_t, 2>> rows;
  int64_t m = 0;
  int64_t n = 0;
  int64_t skinny_rank = 0;
  int64_t used = 0;
  std::string side;
  while (std::cin >> m >> n >> side >> skinny_rank >> used) {
    rows.push_back({skinny_rank, used});
    problems.push_back(problem_of(m, n, side, skinny_rank, rows.back().data()));
  }
  const cuda::Plan plan = cuda::plan_step(problems, options, {}, products, somewhere<void>());
  int64_t bytes = 0;
  for (const Problem<float>& p : problems) bytes += cuda::step_workspace_bytes(p, options);
  const int error = plan.run(plan.image.data(), nullptr);
  std::printf("workspace %lld\n", static_cast<long long>(bytes));
  return error;
}
