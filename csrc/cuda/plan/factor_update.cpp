// Planning of the integrator step: increments, then scalars, then the factors' new values.
#include <cmath>

#include "cuda/kernels/factor_scalars.h"
#include "cuda/plan/group_plan.h"
#include "cuda/plan/step_arrays.h"

namespace dykaf::cuda {
namespace {

// The state of planning: what each launch site works on.
class FactorUpdatePlan {
 public:
  FactorUpdatePlan(GroupPlan& plan, const Options& options, const Products& products)
      : plan_(plan), options_(options), products_(products) {}

  void add(const FactorArrays& arrays) {
    arrays_ = arrays;
    const int32_t i = arrays.matrix_idx;
    const float* H = arrays.H;
    float* scratch = arrays.scratch;
    const Problem<float>& p = plan_.problem(i);
    const bool both = p.L != nullptr && p.R != nullptr;
    FactorProblem left{};
    left.matrix_idx = i;
    FactorProblem right = left;
    if (!both) {
      const auto other = static_cast<double>(p.L != nullptr ? p.n : p.m);
      const double size = p.is_skinny() ? other : std::sqrt(other);
      if (p.L != nullptr) average_left(i, H, size, left);
      if (p.R != nullptr) average_right(i, H, size, right);
      return;
    }
    switch (options_.integrator) {
      case Integrator::kKsl:
        first_.add(gemm_problem(H, p.R, scratch, p.m, p.n, p.n, i), plan_.builder());
        increment_left(i, scratch, H, left);
        finish_left(FactorStage::kKslLeft, left);
        second_.add(gemm_problem(p.L, H, scratch, p.m, p.n, p.m, i), plan_.builder());
        increment_right(i, H, scratch, right);
        finish_right(FactorStage::kKslRight, right);
        break;
      case Integrator::kBug:
        bug(i, H, scratch, right);
        break;
      case Integrator::kDiagonal:
        average_left(i, H, static_cast<double>(p.n), left);
        average_right(i, H, static_cast<double>(p.m), right);
        break;
      case Integrator::kCoupled:  // of whitened updates, which are csrc/aten's
        break;
    }
  }

  void launch() {
    plan_.gemms(first_);
    plan_.gemms(left_);
    scalars(left_scalars_);
    blend(left_blends_);
    plan_.gemms(second_);
    plan_.gemms(right_);
    plan_.gemms(coupling_first_);
    plan_.gemms(coupling_);
    scalars(right_scalars_);
    blend(right_blends_);
  }

 private:
  // L's increment A B^T, with the sums that its scalars need.
  void increment_left(int32_t i, const float* A, const float* B, FactorProblem& scalars_of) {
    const Problem<float>& p = plan_.problem(i);
    GemmProblem sums = gemm_problem(A, B, arrays_.left_increment, p.m, p.m, p.n, i);
    sums.C = p.L;
    sums.epilogue = Epilogue::kSums;
    const EpilogueSums found = left_.add(sums, plan_.builder());
    scalars_of.left = found.partials;
    scalars_of.left_tiles = found.num;
  }

  // R's increment A^T B.
  void increment_right(int32_t i, const float* A, const float* B, FactorProblem& scalars_of) {
    const Problem<float>& p = plan_.problem(i);
    GemmProblem sums = gemm_problem(A, B, arrays_.right_increment, p.n, p.n, p.m, i);
    sums.C = p.R;
    sums.epilogue = Epilogue::kSums;
    const EpilogueSums found = right_.add(sums, plan_.builder());
    scalars_of.right = found.partials;
    scalars_of.right_tiles = found.num;
  }

  void finish_left(FactorStage stage, FactorProblem& scalars_of) {
    scalars_of.stage = stage;
    left_scalars_.push_back(scalars_of);
    blend_of(Side::kLeft, scalars_of.matrix_idx, arrays_.left_increment, left_blends_);
  }

  void finish_right(FactorStage stage, FactorProblem& scalars_of) {
    scalars_of.stage = stage;
    right_scalars_.push_back(scalars_of);
    blend_of(Side::kRight, scalars_of.matrix_idx, arrays_.right_increment, right_blends_);
  }

  void average_left(int32_t i, const float* H, double size, FactorProblem& left) {
    left.size = size;
    increment_left(i, H, H, left);
    finish_left(FactorStage::kAverageLeft, left);
  }

  void average_right(int32_t i, const float* H, double size, FactorProblem& right) {
    right.size = size;
    increment_right(i, H, H, right);
    finish_right(FactorStage::kAverageRight, right);
  }

  // Both increments from the old factors, then <A H, H B> with A and B the increments.
  void bug(int32_t i, const float* H, float* scratch, FactorProblem& both) {
    const Problem<float>& p = plan_.problem(i);
    first_.add(gemm_problem(H, p.R, scratch, p.m, p.n, p.n, i), plan_.builder());
    increment_left(i, scratch, H, both);
    second_.add(gemm_problem(p.L, H, scratch, p.m, p.n, p.m, i), plan_.builder());
    increment_right(i, H, scratch, both);
    coupling_first_.add(gemm_problem(arrays_.left_increment, H, scratch, p.m, p.n, p.m, i),
                        plan_.builder());
    GemmProblem inner = gemm_problem(H, arrays_.right_increment, nullptr, p.m, p.n, p.n, i);
    inner.C = scratch;
    inner.epilogue = Epilogue::kInner;
    const EpilogueSums found = coupling_.add(inner, plan_.builder());
    both.coupling = found.partials;
    both.coupling_tiles = found.num;
    blend_of(Side::kLeft, i, arrays_.left_increment, right_blends_);
    finish_right(FactorStage::kBug, both);
  }

  void blend_of(Side side, int32_t i, const float* increment, std::vector<BlendProblem>& blends) {
    const Problem<float>& p = plan_.problem(i);
    const bool left = side == Side::kLeft;
    blends.push_back(
        {left ? p.L : p.R, increment, left ? p.m * p.m : p.n * p.n, side, i, /*tile_begin=*/0});
  }

  void scalars(const std::vector<FactorProblem>& problems) {
    plan_.one_block_each(problems, [beta = options_.factor_beta](
                                       const auto& launch, const Group& group, Stream stream) {
      return launch_factor_scalars(launch, group, beta, stream);
    });
  }

  void blend(const std::vector<BlendProblem>& problems) {
    plan_.tiled(
        problems, [](const BlendProblem& b) { return element_tiles(1, b.size); },
        [](const auto& launch, const Group& group, Stream stream) {
          return launch_blend(launch, group, stream);
        });
  }

  GroupPlan& plan_;
  const Options& options_;
  const Products& products_;
  GemmSite first_{GemmForm::kNN, products_};           // H R
  GemmSite left_{GemmForm::kSymmetricNT, products_};   // (.) H^T
  GemmSite second_{GemmForm::kNN, products_};          // L H
  GemmSite right_{GemmForm::kSymmetricTN, products_};  // H^T (.)
  GemmSite coupling_first_{GemmForm::kNN, products_};  // A H
  GemmSite coupling_{GemmForm::kNN, products_};        // H B
  std::vector<FactorProblem> left_scalars_;
  std::vector<FactorProblem> right_scalars_;
  std::vector<BlendProblem> left_blends_;
  std::vector<BlendProblem> right_blends_;
  FactorArrays arrays_{};  // of the matrix that is being added
};

}  // namespace

void add_factor_update(GroupPlan& plan, const Options& options, const Products& products,
                       const std::vector<FactorArrays>& factors) {
  FactorUpdatePlan update(plan, options, products);
  for (const FactorArrays& arrays : factors) update.add(arrays);
  update.launch();
}

Plan plan_factor_update(std::span<const Problem<float>> problems, const Options& options,
                        const DeviceInputs& inputs, const Products& products, void* workspace) {
  GroupPlan plan(problems, workspace);
  plan.prepare(options, inputs, StepCount::kKeep);
  std::vector<LoadProblem> loads;
  std::vector<FactorArrays> factors;
  for (int32_t i = 0; i < plan.num(); ++i) {
    const Problem<float>& p = plan.problem(i);
    const StepArrays arrays(p, options);
    PlanBuilder& builder = plan.builder();
    auto* H = builder.take<float>(arrays.H);
    loads.push_back({flat_array(p, i), H});
    auto* scratch = builder.take<float>(arrays.scratch);
    auto* left_increment = builder.take<float>(arrays.left_increment);
    auto* right_increment = builder.take<float>(arrays.right_increment);
    factors.push_back({i, H, scratch, left_increment, right_increment});
  }
  plan.elements(loads);
  add_factor_update(plan, options, products, factors);
  return plan.finish();
}

}  // namespace dykaf::cuda
