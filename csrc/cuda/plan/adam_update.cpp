// Planning of Adam and of the parameters' update on their own.
#include "cuda/kernels/second_moment.h"
#include "cuda/plan/group_plan.h"

namespace dykaf::cuda {

void add_compact_adam(GroupPlan& plan, const Options& options,
                      const std::vector<AdamArrays>& adams) {
  std::vector<MomentProblem> moments;
  std::vector<CompactAdamProblem> problems;
  for (const AdamArrays& adam : adams) {
    const Problem<float>& p = plan.problem(adam.matrix_idx);
    const bool rank_one = options.second_moment == SecondMoment::kRankOne;
    PlanBuilder& builder = plan.builder();
    MomentProblem q{};
    q.H = adam.H;
    q.row_sums = builder.take<double>(p.m);
    q.col_sums = builder.take<double>(p.n);
    q.u = rank_one ? builder.take<double>(p.m) : nullptr;
    q.scratch = rank_one ? builder.take<double>(2) : nullptr;
    q.row_root = builder.take<float>(p.m);
    q.col_root = builder.take<float>(p.n);
    q.matrix_idx = adam.matrix_idx;
    moments.push_back(q);
    problems.push_back({matrix_array(p, adam.matrix_idx), adam.H, q.row_root, q.col_root,
                        adam.update, adam.partials});
  }
  for (const MomentStage stage : {MomentStage::kRowSums, MomentStage::kRowVector,
                                  MomentStage::kColSums, MomentStage::kVectors}) {
    const auto launch = [stage, beta2 = options.beta2](const auto& launch, const Group& group,
                                                       Stream stream) {
      return launch_moment(stage, launch, group, beta2, stream);
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
  plan.elements(problems);
}

Plan plan_adam_update(std::span<const Problem<float>> problems, const Options& options,
                      const DeviceInputs& inputs, float* const* updates, void* workspace) {
  GroupPlan plan(problems, workspace);
  plan.prepare(options, inputs, StepCount::kAdvance);
  std::vector<LoadProblem> loads;
  std::vector<AdamProblem> adams;
  std::vector<AdamArrays> compact;
  std::vector<RmsProblem> sums;
  for (int32_t i = 0; i < plan.num(); ++i) {
    const Problem<float>& p = plan.problem(i);
    const bool is_compact = p.exp_avg_sq_row != nullptr;
    const ElementArray array = is_compact ? matrix_array(p, i) : flat_array(p, i);
    auto* partials = plan.builder().take<double>(num_blocks(array));
    if (is_compact) {
      auto* H = plan.builder().take<float>(p.size());
      loads.push_back({flat_array(p, i), H});
      compact.push_back({i, H, updates[i], partials});
    } else {
      adams.push_back({array, /*H=*/nullptr, updates[i], partials});
    }
    sums.push_back({partials, num_blocks(array), /*stride=*/1, i});
  }
  plan.elements(loads);
  plan.elements(adams);
  if (!compact.empty()) add_compact_adam(plan, options, compact);
  plan.update_rms(sums);
  return plan.finish();
}

Plan plan_apply_update(std::span<const Problem<float>> problems, const Options& options,
                       const DeviceInputs& inputs, const float* const* updates, void* workspace) {
  GroupPlan plan(problems, workspace);
  plan.prepare(options, inputs, StepCount::kKeep);
  std::vector<ApplyProblem> applies;
  for (int32_t i = 0; i < plan.num(); ++i) {
    applies.push_back({flat_array(plan.problem(i), i), updates[i]});
  }
  plan.elements(applies);
  return plan.finish();
}

}  // namespace dykaf::cuda
