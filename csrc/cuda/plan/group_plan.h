// Collects the work of one list of matrices and turns it into launches.
#pragma once

#include <optional>
#include <utility>

#include "cuda/kernels/elements.h"
#include "cuda/kernels/prepare.h"
#include "cuda/plan/gemm_plan.h"
#include "cuda/plan/on_device.h"
#include "cuda/plan/plan_builder.h"

namespace dykaf::cuda {

// A group whose matrices lie in the image. Scalars and options are those of `prepare`; without it
// no launch may read them.
struct GroupInImage {
  size_t matrices;
  int32_t num;
  MatrixScalars* scalars = nullptr;
  AdamOptions adam = {};
  size_t adam_place = 0;  // in the image

  Group at(const std::byte* image) const {
    return {as<MatrixOnDevice>(image + matrices), scalars, num, adam};
  }
};

class GroupPlan {
 public:
  GroupPlan(std::span<const Problem<float>> problems, void* workspace)
      : problems_(problems),
        builder_(workspace),
        group_{.matrices = builder_.add(matrices_on_device(problems)), .num = num()} {}

  int32_t num() const { return static_cast<int32_t>(problems_.size()); }
  const Problem<float>& problem(int32_t i) const { return problems_[static_cast<size_t>(i)]; }
  PlanBuilder& builder() { return builder_; }
  Plan finish() { return builder_.finish(); }

  // The scalars of every matrix and the options of Adam; all that reads them comes after.
  void prepare(const Options& options, const DeviceInputs& inputs, StepCount step_count) {
    group_.scalars = builder_.take<MatrixScalars>(num());
    group_.adam = adam_options(options);
    group_.adam_place = builder_.add(std::vector{group_.adam});
    auto given = std::make_shared<PlanInputs>(options, inputs);
    builder_.set_inputs(given);
    builder_.launch([=, group = group_](const std::byte* image, Stream stream) {
      return launch_prepare(group.at(image), given->options, given->device, step_count, stream);
    });
  }

  // One launch over `problems` with num_tiles(problem) blocks each.
  template <typename GroupedProblem, typename NumTiles, typename LaunchGrouped>
  void tiled(std::vector<GroupedProblem> problems, const NumTiles& num_tiles,
             const LaunchGrouped& launch_grouped) {
    const int64_t grid = assign_tiles(problems, num_tiles);
    launch(problems, grid, launch_grouped);
  }

  // One launch over `problems` with one block each.
  template <typename GroupedProblem, typename LaunchGrouped>
  void one_block_each(const std::vector<GroupedProblem>& problems,
                      const LaunchGrouped& launch_grouped) {
    launch(problems, static_cast<int64_t>(problems.size()), launch_grouped);
  }

  template <typename ElementProblem>
  void elements(std::vector<ElementProblem> problems) {
    tiled(
        std::move(problems), [](const ElementProblem& e) { return element_tiles(e.m, e.n); },
        [](const auto& launch, const Group& group, Stream stream) {
          return launch_elements(launch, group, stream);
        });
  }

  // update_rms, and norms.
  void update_rms(const std::vector<RmsProblem>& problems) {
    one_block_each(problems, [](const auto& launch, const Group& group, Stream stream) {
      return launch_update_rms(launch, group, stream);
    });
  }

  // One launch for each block shape that occurs, and what the library computes.
  void gemms(const GemmSite& site) {
    const MatmulPrecision precision = site.products().precision;
    for (int i = 0; i < kNumTileClasses; ++i) {
      const auto tile_class = static_cast<TileClass>(i);
      const GemmForm form = site.form();
      std::vector<GemmProblem> problems = site.problems(tile_class);
      const int64_t grid = assign_tiles(
          problems, [&](const GemmProblem& p) { return num_tiles(tile_class, form, p.m, p.n); });
      if (problems.empty()) continue;
      const size_t offset = builder_.add(problems);
      const auto count = static_cast<int32_t>(problems.size());
      builder_.launch([=, group = group_](const std::byte* image, Stream stream) {
        const GemmLaunch launch{as<GemmProblem>(image + offset),
                                as<MatrixOnDevice>(image + group.matrices),
                                group.scalars,
                                count,
                                grid,
                                as<AdamOptions>(image + group.adam_place)};
        return launch_gemm(precision, form, tile_class, launch, stream);
      });
    }
    for (const LibraryProducts& products : site.by_library()) {
      multiply(products, *site.products().library);
    }
    elements(site.adams());
    elements(site.quintics());
    elements(site.applies());
  }

 private:
  // One call of the library. It is made where the step is skipped, too, and so it may write to
  // nothing but workspace.
  void multiply(const LibraryProducts& products, Library& library) {
    // One for all: the calls come one after the other.
    if (!library_workspace_) library_workspace_ = builder_.take<std::byte>(kLibraryWorkspaceBytes);
    BlasBatch batch = products.batch;
    batch.count = static_cast<int32_t>(products.D.size());
    batch.first_a = products.A.front();
    batch.first_b = products.B.front();
    batch.first_d = products.D.front();
    batch.workspace = *library_workspace_;
    const size_t A = builder_.add(products.A);
    const size_t B = builder_.add(products.B);
    const size_t D = builder_.add(products.D);
    builder_.launch([=, &library](const std::byte* image, Stream stream) {
      BlasBatch on_device = batch;
      on_device.A = as<const float*>(image + A);
      on_device.B = as<const float*>(image + B);
      on_device.D = as<float*>(image + D);
      library.multiply(on_device, stream);
      return 0;
    });
  }

  template <typename GroupedProblem, typename LaunchGrouped>
  void launch(const std::vector<GroupedProblem>& problems, int64_t grid,
              const LaunchGrouped& launch_grouped) {
    if (problems.empty()) return;
    const size_t offset = builder_.add(problems);
    const auto count = static_cast<int32_t>(problems.size());
    builder_.launch([=, group = group_](const std::byte* image, Stream stream) {
      return launch_grouped(
          Grouped<GroupedProblem>{as<GroupedProblem>(image + offset), count, grid}, group.at(image),
          stream);
    });
  }

  std::span<const Problem<float>> problems_;
  PlanBuilder builder_;
  GroupInImage group_;
  std::optional<std::byte*> library_workspace_;
};

// D = op(A) op(B), D [m, n], of the matrix `matrix_idx`.
inline GemmProblem gemm_problem(const float* A, const float* B, float* D, int64_t m, int64_t n,
                                int64_t k, int32_t matrix_idx) {
  GemmProblem p{};
  p.A = A;
  p.B = B;
  p.D = D;
  p.m = static_cast<int32_t>(m);
  p.n = static_cast<int32_t>(n);
  p.k = static_cast<int32_t>(k);
  p.matrix_idx = matrix_idx;
  p.epilogue = Epilogue::kStore;
  return p;
}

// An array of a matrix, and the same as one row.
inline ElementArray matrix_array(const Problem<float>& p, int32_t matrix_idx) {
  return {p.m, p.n, matrix_idx, /*tile_begin=*/0};
}
inline ElementArray flat_array(const Problem<float>& p, int32_t matrix_idx) {
  return {1, p.size(), matrix_idx, /*tile_begin=*/0};
}

// The blocks of a launch over the array.
inline int32_t num_blocks(const ElementArray& array) {
  return static_cast<int32_t>(element_tiles(array.m, array.n));
}

// What Adam of one matrix takes and leaves where it is not part of a multiplication.
struct AdamArrays {
  int32_t matrix_idx;
  const float* H;    // [m, n], the gradient over tau
  float* update;     // [m, n]
  double* partials;  // one for each block of the launch over [m, n]
};

// The two multiplications that rotate a matrix.
class RotationGemms {
 public:
  RotationGemms(Rotation rotation, const Products& products)
      : into_(rotation == Rotation::kIntoBasis),
        left_(into_ ? GemmForm::kTN : GemmForm::kNN, products),
        right_(into_ ? GemmForm::kNN : GemmForm::kNT, products) {}

  // Q_L^T in Q_R or Q_L in Q_R^T to `out`, through `scratch` where there are two bases; `finish`
  // completes the last multiplication's description. One basis at least; `out` is `in` where there
  // are two, or does not overlap with it. Returns the last multiplication's sums.
  template <typename Finish>
  EpilogueSums add(GroupPlan& plan, int32_t matrix_idx, const float* in, float* scratch, float* out,
                   const Finish& finish) {
    const Problem<float>& p = plan.problem(matrix_idx);
    const bool both = p.Q_L != nullptr && p.Q_R != nullptr;
    if (p.Q_L != nullptr) {
      GemmProblem left = gemm_problem(p.Q_L, in, both ? scratch : out, p.m, p.n, p.m, matrix_idx);
      if (!both) return add_last(left_, plan, left, finish);
      left_.add(left, plan.builder());
      in = scratch;
    }
    return add_last(right_, plan, gemm_problem(in, p.Q_R, out, p.m, p.n, p.n, matrix_idx), finish);
  }

  const GemmSite& left() const { return left_; }
  const GemmSite& right() const { return right_; }

 private:
  template <typename Finish>
  static EpilogueSums add_last(GemmSite& site, GroupPlan& plan, GemmProblem last,
                               const Finish& finish) {
    finish(last);
    return site.add(last, plan.builder());
  }

  bool into_;
  GemmSite left_;
  GemmSite right_;
};

// What the factor update of a matrix works on.
struct FactorArrays {
  int32_t matrix_idx;
  const float* H;          // [m, n], the rotated gradient over tau
  float* scratch;          // [m, n]
  float* left_increment;   // [m, m], with L
  float* right_increment;  // [n, n], with R
};

// Adds the launches of the factor update.
void add_factor_update(GroupPlan& plan, const Options& options, const Products& products,
                       const std::vector<FactorArrays>& factors);

// What Newton-Schulz steps of a matrix work on, s being its short side.
struct OrthogonalArrays {
  int32_t matrix_idx;
  float* update;   // [m, n], whose norm update_rms tells; in and out
  float* scratch;  // [m, n]
  float* A;        // [s, s]
  float* B;        // [s, s]
};

// Adds the launches that make updates orthogonal, with their update_rms.
void add_orthogonalize(GroupPlan& plan, const Options& options, const Products& products,
                       const std::vector<OrthogonalArrays>& updates);

// Adds the launches of Adam with a compact second moment.
void add_compact_adam(GroupPlan& plan, const Options& options,
                      const std::vector<AdamArrays>& adams);

// The same of skinny matrices, H being rotated on the short side, with the long side's factor.
void add_skinny_update(GroupPlan& plan, const Options& options,
                       const std::vector<AdamArrays>& adams);

}  // namespace dykaf::cuda
