// Planning of what skinny matrices have of their own (see dykaf/types.h; docs/algorithm.md has the
// mathematics).
#include "cuda/kernels/skinny.h"
#include "cuda/plan/group_plan.h"

namespace dykaf::cuda {
namespace {

class SkinnyPlan {
 public:
  SkinnyPlan(GroupPlan& plan, const Options& options) : plan_(plan), options_(options) {}

  void add(const AdamArrays& adam) {
    const Problem<float>& p = plan_.problem(adam.matrix_idx);
    const int64_t s = p.short_side();
    const int64_t inner = p.rows[0];
    PlanBuilder& builder = plan_.builder();
    auto* XV = builder.take<float>(s * inner);
    SkinnyProblem q{};
    q.X = adam.H;
    q.sums = builder.take<double>(skinny_pieces(p.long_side()) * s);
    q.momentum_sums = builder.take<double>(skinny_pieces(p.long_side()) * s);
    q.XV = XV;
    q.MV = builder.take<float>(s * inner);
    q.beyond = builder.take<float>(s);
    q.inner = static_cast<int32_t>(inner);
    q.used = static_cast<int32_t>(p.rows[1]);
    q.matrix_idx = adam.matrix_idx;
    problems_.push_back(q);
    project(p, q.X, XV, q);
    project(p, p.exp_avg, q.MV, q);
    expand(p, adam.update, q);
    BeyondProblem beyond{matrix_array(p, adam.matrix_idx),
                         adam.update,
                         options_.nesterov ? adam.H : nullptr,
                         /*row=*/nullptr,
                         /*col=*/nullptr,
                         adam.partials};
    (p.is_wide() ? beyond.row : beyond.col) = q.beyond;
    beyond_.push_back(beyond);
  }

  void launch() {
    stage(SkinnyStage::kGradient);
    plan_.gemms(wide_projections_);
    plan_.gemms(tall_projections_);
    stage(SkinnyStage::kMoments);
    plan_.gemms(wide_expansions_);
    plan_.gemms(tall_expansions_);
    plan_.elements(beyond_);
    stage(SkinnyStage::kLongFactor);
  }

 private:
  // out = x V^T [s, inner], of a tall matrix V x [inner, s].
  void project(const Problem<float>& p, const float* x, float* out, const SkinnyProblem& q) {
    if (p.is_wide()) {
      wide_projections_.add(gemm_problem(x, p.basis, out, p.m, q.inner, p.n, q.matrix_idx),
                            plan_.builder());
    } else {
      tall_projections_.add(gemm_problem(p.basis, x, out, q.inner, p.n, p.m, q.matrix_idx),
                            plan_.builder());
    }
  }

  // out = MV V, of a tall matrix V^T MV; [m, n].
  void expand(const Problem<float>& p, float* out, const SkinnyProblem& q) {
    if (p.is_wide()) {
      wide_expansions_.add(gemm_problem(q.MV, p.basis, out, p.m, p.n, q.inner, q.matrix_idx),
                           plan_.builder());
    } else {
      tall_expansions_.add(gemm_problem(p.basis, q.MV, out, p.m, p.n, q.inner, q.matrix_idx),
                           plan_.builder());
    }
  }

  void stage(SkinnyStage stage) {
    const auto launch = [stage, factor_beta = options_.factor_beta](
                            const auto& launch, const Group& group, Stream stream) {
      return launch_skinny(stage, launch, group, factor_beta, stream);
    };
    if (stage == SkinnyStage::kLongFactor) return plan_.one_block_each(problems_, launch);
    plan_.tiled(
        problems_,
        [&](const SkinnyProblem& q) {
          const Problem<float>& p = plan_.problem(q.matrix_idx);
          return skinny_tiles(stage, p.short_side(), p.long_side());
        },
        launch);
  }

  GroupPlan& plan_;
  const Options& options_;
  // What lies outside of V is a difference, which rounding of the projections would drown.
  const Products full_{MatmulPrecision::kHighest};
  std::vector<SkinnyProblem> problems_;
  std::vector<BeyondProblem> beyond_;
  GemmSite wide_projections_{GemmForm::kNT, full_};
  GemmSite tall_projections_{GemmForm::kNN, full_};
  GemmSite wide_expansions_{GemmForm::kNN, full_};
  GemmSite tall_expansions_{GemmForm::kTN, full_};
};

}  // namespace

void add_skinny_update(GroupPlan& plan, const Options& options,
                       const std::vector<AdamArrays>& adams) {
  SkinnyPlan skinny(plan, options);
  for (const AdamArrays& adam : adams) skinny.add(adam);
  skinny.launch();
}

}  // namespace dykaf::cuda
