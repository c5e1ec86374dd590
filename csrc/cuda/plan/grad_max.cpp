// Planning of max|gradient|.
#include "cuda/kernels/grad_max.h"

#include "cuda/plan/plan_builder.h"

namespace dykaf::cuda {

Plan plan_grad_max(std::span<const Gradient> gradients, double* maxima, void* workspace) {
  PlanBuilder builder(workspace);
  std::vector<GradMaxProblem> problems;
  for (const Gradient& gradient : gradients) {
    GradMaxProblem p{};
    p.gradient = gradient;
    p.num_tiles = static_cast<int32_t>(grad_max_tiles(gradient.size));
    p.partials = builder.take<float>(p.num_tiles);
    p.maximum = maxima + problems.size();
    problems.push_back(p);
  }
  const int64_t grid =
      assign_tiles(problems, [](const GradMaxProblem& p) { return int64_t{p.num_tiles}; });
  if (problems.empty()) return builder.finish();
  const size_t offset = builder.add(problems);
  const auto num = static_cast<int32_t>(problems.size());
  const auto launch = [&](auto launch_stage) {
    builder.launch([=](const std::byte* image, Stream stream) {
      return launch_stage(Grouped<GradMaxProblem>{as<GradMaxProblem>(image + offset), num, grid},
                          stream);
    });
  };
  launch(launch_grad_max);
  launch(launch_grad_max_finish);
  return builder.finish();
}

}  // namespace dykaf::cuda
