// Planning of Adam and of the parameters' update on their own.
#include "cuda/plan/group_plan.h"

namespace dykaf::cuda {

void add_compact_adam(GroupPlan& plan, const Options& options,
                      const std::vector<ElementProblem>& problems) {
  std::vector<MomentProblem> moments;
  std::vector<ElementProblem> adams;
  for (ElementProblem e : problems) {
    const Problem<float>& p = plan.problem(e.matrix_idx);
    const bool rank_one = options.second_moment == SecondMoment::kRankOne;
    PlanBuilder& builder = plan.builder();
    MomentProblem q{};
    q.H = e.in;
    q.row_sums = builder.take<double>(p.m);
    q.col_sums = builder.take<double>(p.n);
    q.u = rank_one ? builder.take<double>(p.m) : nullptr;
    q.scratch = rank_one ? builder.take<double>(2) : nullptr;
    q.row_root = builder.take<float>(p.m);
    q.col_root = builder.take<float>(p.n);
    q.matrix_idx = e.matrix_idx;
    moments.push_back(q);
    e.row = q.row_root;
    e.col = q.col_root;
    adams.push_back(e);
  }
  for (const MomentStage stage : {MomentStage::kRowSums, MomentStage::kRowVector,
                                  MomentStage::kColSums, MomentStage::kVectors}) {
    const auto launch = [stage, beta2 = options.beta2](const auto& launch, const Matrices& matrices,
                                                       Stream stream) {
      return launch_moment(stage, launch, matrices, beta2, stream);
    };
    if (stage == MomentStage::kRowSums || stage == MomentStage::kColSums) {
      plan.tiled(
          moments,
          [&](const MomentProblem& q) {
            const Problem<float>& p = plan.problem(q.matrix_idx);
            return moment_tiles(stage, p.m, p.n);
          },
          launch);
    } else if (stage == MomentStage::kVectors || options.second_moment == SecondMoment::kRankOne) {
      plan.one_block_each(moments, launch);
    }
  }
  plan.elements(ElementOp::kCompact, adams);
}

Plan plan_adam_update(std::span<const Problem<float>> problems, const Options& options,
                      const DeviceInputs& inputs, float* const* updates, void* workspace) {
  GroupPlan plan(problems, workspace);
  std::vector<ElementProblem> loads;
  std::vector<ElementProblem> full;
  std::vector<ElementProblem> compact;
  std::vector<RmsProblem> sums;
  for (int32_t i = 0; i < plan.num(); ++i) {
    const Problem<float>& p = plan.problem(i);
    loads.push_back(element_problem(1, p.size(), i));
    loads.back().out = plan.builder().take<float>(p.size());
    const bool is_full = p.exp_avg_sq != nullptr;
    ElementProblem adam = is_full ? element_problem(1, p.size(), i) : element_problem(p.m, p.n, i);
    const auto num_tiles = static_cast<int32_t>(element_tiles(adam.m, adam.n));
    adam.in = loads.back().out;
    adam.out = updates[i];
    adam.partials = plan.builder().take<double>(num_tiles);
    (is_full ? full : compact).push_back(adam);
    sums.push_back({adam.partials, num_tiles, /*stride=*/1, i});
  }
  plan.prepare(options, inputs, StepCount::kAdvance);
  plan.elements(ElementOp::kLoad, loads);
  plan.elements(ElementOp::kAdam, full);
  if (!compact.empty()) add_compact_adam(plan, options, compact);
  plan.update_rms(sums);
  return plan.finish();
}

Plan plan_apply_update(std::span<const Problem<float>> problems, const Options& options,
                       const DeviceInputs& inputs, const float* const* updates, void* workspace) {
  GroupPlan plan(problems, workspace);
  std::vector<ElementProblem> applies;
  for (int32_t i = 0; i < plan.num(); ++i) {
    applies.push_back(element_problem(1, plan.problem(i).size(), i));
    applies.back().in = updates[i];
  }
  plan.prepare(options, inputs, StepCount::kKeep);
  plan.elements(ElementOp::kApply, applies);
  return plan.finish();
}

}  // namespace dykaf::cuda
