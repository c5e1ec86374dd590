// Planning of the Newton-Schulz steps that make updates orthogonal (dykaf/newton_schulz.h).
#include "cuda/plan/group_plan.h"
#include "cuda/plan/step_arrays.h"
#include "dykaf/newton_schulz.h"

namespace dykaf::cuda {
namespace {

// The multiplications of one step over all matrices.
struct NewtonSchulzGemms {
  GemmSite wide_grams;             // A = X X^T
  GemmSite tall_grams;             // A = X^T X
  GemmSite squares;                // B = b A + c A^2
  GemmSite quintics;               // a X + B X, of a tall matrix a X + X B
  std::vector<RmsProblem> bounds;  // ||A||

  explicit NewtonSchulzGemms(const Products& products)
      : wide_grams(GemmForm::kSymmetricNT, products),
        tall_grams(GemmForm::kSymmetricTN, products),
        squares(GemmForm::kSymmetricNT, products),
        quintics(GemmForm::kNN, products) {}

  // A step from X to `next`, or from X over the root of ||A|| where that has a place at `bound`;
  // returns the sums of squares of what comes out.
  EpilogueSums add(GroupPlan& plan, const OrthogonalArrays& arrays, const float* X, float* next,
                   float* bound, Epilogue epilogue) {
    const int32_t i = arrays.matrix_idx;
    const Problem<float>& p = plan.problem(i);
    PlanBuilder& builder = plan.builder();
    const bool is_tall = p.m > p.n;
    const int64_t s = p.short_side();
    GemmSite& grams = is_tall ? tall_grams : wide_grams;
    GemmProblem gram = gemm_problem(X, X, arrays.A, s, s, p.long_side(), i);
    if (bound != nullptr) gram.epilogue = Epilogue::kSums;
    const EpilogueSums sums = grams.add(gram, builder);
    if (bound != nullptr) {
      // The squares are the last of each block's sums.
      bounds.push_back({sums.partials + kNumSums - 1, sums.num, sums.stride, i, bound});
    }
    GemmProblem square = gemm_problem(arrays.A, arrays.A, arrays.B, s, s, s, i);
    square.C = arrays.A;
    square.bound = bound;
    square.epilogue = Epilogue::kQuadratic;
    squares.add(square, builder);
    GemmProblem product = is_tall ? gemm_problem(X, arrays.B, next, p.m, p.n, s, i)
                                  : gemm_problem(arrays.B, X, next, p.m, p.n, s, i);
    product.C = X;
    product.bound = bound;
    product.epilogue = epilogue;
    return quintics.add(product, builder);
  }

  void launch(GroupPlan& plan) const {
    plan.gemms(wide_grams);
    plan.gemms(tall_grams);
    plan.update_rms(bounds);
    plan.gemms(squares);
    plan.gemms(quintics);
  }
};

}  // namespace

void add_orthogonalize(GroupPlan& plan, const Options& options, const Products& products,
                       const std::vector<OrthogonalArrays>& updates) {
  const int64_t num_steps = options.orthogonalize;
  std::vector<NormalizeProblem> normalizations;
  std::vector<NewtonSchulzGemms> steps(static_cast<size_t>(num_steps), NewtonSchulzGemms(products));
  std::vector<RmsProblem> sums;
  for (const OrthogonalArrays& arrays : updates) {
    const int32_t i = arrays.matrix_idx;
    // The last of the steps, which go to and fro, ends in `update`.
    float* X = num_steps % 2 == 0 ? arrays.update : arrays.scratch;
    float* next = num_steps % 2 == 0 ? arrays.scratch : arrays.update;
    normalizations.push_back({flat_array(plan.problem(i), i), arrays.update, X});
    float* bound = starts_from_gram(options) ? plan.builder().take<float>(1) : nullptr;
    for (NewtonSchulzGemms& step : steps) {
      const bool is_last = &step == &steps.back();
      const EpilogueSums last = step.add(plan, arrays, X, next, bound,
                                         is_last ? Epilogue::kLastQuintic : Epilogue::kQuintic);
      bound = nullptr;  // of the first step
      if (is_last) sums.push_back({last.partials, last.num, last.stride, i});
      std::swap(X, next);
    }
  }
  plan.elements(normalizations);
  for (const NewtonSchulzGemms& step : steps) step.launch(plan);
  plan.update_rms(sums);
}

Plan plan_orthogonalize(std::span<const Problem<float>> problems, const Options& options,
                        const DeviceInputs& inputs, const Products& products, float* const* updates,
                        void* workspace) {
  GroupPlan plan(problems, workspace);
  plan.prepare(options, inputs, StepCount::kKeep);
  std::vector<SquaresProblem> squares;
  std::vector<RmsProblem> sums;
  std::vector<OrthogonalArrays> arrays;
  for (int32_t i = 0; i < plan.num(); ++i) {
    const Problem<float>& p = plan.problem(i);
    PlanBuilder& builder = plan.builder();
    const ElementArray array = flat_array(p, i);
    auto* partials = builder.take<double>(num_blocks(array));
    squares.push_back({array, updates[i], partials});
    sums.push_back({partials, num_blocks(array), /*stride=*/1, i});
    const int64_t square = p.short_side() * p.short_side();
    auto* scratch = builder.take<float>(p.size());
    auto* A = builder.take<float>(square);
    auto* B = builder.take<float>(square);
    arrays.push_back({i, updates[i], scratch, A, B});
  }
  plan.elements(squares);
  plan.update_rms(sums);
  add_orthogonalize(plan, options, products, arrays);
  return plan.finish();
}

}  // namespace dykaf::cuda
