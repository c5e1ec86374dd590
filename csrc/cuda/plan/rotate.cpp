// Planning of the rotations on their own.
#include "cuda/plan/group_plan.h"

namespace dykaf::cuda {

Plan plan_rotate(std::span<const Problem<float>> problems, Rotation rotation,
                 const float* const* inputs, float* const* outputs, const Products& products,
                 void* workspace) {
  GroupPlan plan(problems, workspace);
  RotationGemms gemms(rotation, products);
  for (int32_t i = 0; i < plan.num(); ++i) {
    const Problem<float>& p = plan.problem(i);
    const bool both = p.Q_L != nullptr && p.Q_R != nullptr;
    float* scratch = both ? plan.builder().take<float>(p.size()) : nullptr;
    gemms.add(plan, i, inputs[i], scratch, outputs[i], [](GemmProblem&) {});
  }
  plan.gemms(gemms.left());
  plan.gemms(gemms.right());
  return plan.finish();
}

}  // namespace dykaf::cuda
