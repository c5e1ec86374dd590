// Planning of the whole step, and running of plans.
#include "cuda/plan/group_plan.h"
#include "cuda/plan/step_arrays.h"

namespace dykaf::cuda {
namespace {

// One step over all matrices: with factors, without, and what is no matrix.
class StepPlan {
 public:
  StepPlan(std::span<const Problem<float>> problems, const Options& options,
           const DeviceInputs& inputs, const Products& products, void* workspace)
      : plan_(problems, workspace), options_(options), inputs_(inputs), products_(products) {}

  Plan build() {
    plan_.prepare(options_, inputs_, StepCount::kAdvance);
    for (int32_t i = 0; i < plan_.num(); ++i) {
      const Problem<float>& p = plan_.problem(i);
      if (is_element_wise(p, options_)) {
        add_adamw(i);
      } else if (p.is_unsided()) {
        add_unsided(i);
      } else {
        add_sided(i);
      }
    }
    plan_.elements(adamws_);
    plan_.elements(loads_);
    plan_.elements(adams_);
    plan_.gemms(into_.left());
    plan_.gemms(into_.right());
    if (!compact_.empty()) add_compact_adam(plan_, options_, compact_);
    if (!skinny_.empty()) add_skinny_update(plan_, options_, skinny_);
    plan_.update_rms(sums_);
    if (!orthogonal_.empty()) add_orthogonalize(plan_, options_, products_, orthogonal_);
    plan_.gemms(out_of_.left());
    plan_.gemms(out_of_.right());
    plan_.elements(applies_);
    add_factor_update(plan_, options_, products_, factors_);
    return plan_.finish();
  }

 private:
  void add_adamw(int32_t i) {
    const ElementArray array = flat_array(plan_.problem(i), i);
    auto* partials = plan_.builder().take<double>(num_blocks(array));
    adamws_.push_back({array, partials});
    sums_.push_back({partials, num_blocks(array), /*stride=*/1, i});
  }

  void add_unsided(int32_t i) {
    const Problem<float>& p = plan_.problem(i);
    const StepArrays arrays(p, options_);
    PlanBuilder& builder = plan_.builder();
    auto* update = builder.take<float>(arrays.update);
    if (p.exp_avg_sq_row != nullptr) {
      auto* H = builder.take<float>(arrays.H);
      loads_.push_back({flat_array(p, i), H});
      add_adam(i, H, update, compact_);
    } else {
      const ElementArray array = flat_array(p, i);
      auto* partials = builder.take<double>(num_blocks(array));
      adams_.push_back({array, /*H=*/nullptr, update, partials});
      sums_.push_back({partials, num_blocks(array), /*stride=*/1, i});
    }
    if (orthogonalizes(p, options_)) {
      auto* scratch = builder.take<float>(arrays.scratch);
      auto* A = builder.take<float>(arrays.left_increment);
      auto* B = builder.take<float>(arrays.right_increment);
      orthogonal_.push_back({i, update, scratch, A, B});
    }
    applies_.push_back({flat_array(p, i), update});
  }

  void add_sided(int32_t i) {
    const Problem<float>& p = plan_.problem(i);
    const bool both = p.Q_L != nullptr && p.Q_R != nullptr;
    const StepArrays arrays(p, options_);
    PlanBuilder& builder = plan_.builder();
    auto* H = builder.take<float>(arrays.H);
    auto* scratch = builder.take<float>(arrays.scratch);
    auto* update = builder.take<float>(arrays.update);
    auto* left = builder.take<float>(arrays.left_increment);
    auto* right = builder.take<float>(arrays.right_increment);
    factors_.push_back({i, H, scratch, left, right});
    if (orthogonalizes(p, options_)) {
      orthogonal_.push_back({i, update, scratch, /*A=*/left, /*B=*/right});
    }

    // With one basis the update must not land where the multiplication still reads the gradient.
    float* loaded = both ? update : scratch;
    loads_.push_back({flat_array(p, i), loaded});
    if (p.exp_avg_sq_row == nullptr && !p.is_skinny()) {
      const EpilogueSums sums = into_.add(plan_, i, loaded, scratch, H, [&](GemmProblem& last) {
        last.epilogue = Epilogue::kAdam;
        last.update = update;
      });
      sums_.push_back({sums.partials, sums.num, sums.stride, i});
    } else {
      into_.add(plan_, i, loaded, scratch, H, [](GemmProblem&) {});
      add_adam(i, H, update, p.is_skinny() ? skinny_ : compact_);
    }
    // By now the place of the gradient over tau is free.
    out_of_.add(plan_, i, update, scratch, loaded,
                [](GemmProblem& last) { last.epilogue = Epilogue::kParameter; });
  }

  void add_adam(int32_t i, const float* H, float* update, std::vector<AdamArrays>& adams) {
    const int32_t num_partials = num_blocks(matrix_array(plan_.problem(i), i));
    auto* partials = plan_.builder().take<double>(num_partials);
    adams.push_back({i, H, update, partials});
    sums_.push_back({partials, num_partials, /*stride=*/1, i});
  }

  GroupPlan plan_;
  const Options& options_;
  const DeviceInputs& inputs_;
  const Products& products_;
  RotationGemms into_{Rotation::kIntoBasis, products_};
  RotationGemms out_of_{Rotation::kOutOfBasis, products_};
  std::vector<AdamWProblem> adamws_;
  std::vector<LoadProblem> loads_;
  std::vector<AdamProblem> adams_;
  std::vector<ApplyProblem> applies_;
  std::vector<AdamArrays> compact_;
  std::vector<AdamArrays> skinny_;
  std::vector<RmsProblem> sums_;
  std::vector<OrthogonalArrays> orthogonal_;
  std::vector<FactorArrays> factors_;
};

}  // namespace

int Plan::run(const void* device_image, Stream stream) const {
  for (const Launch& launch : launches) {
    const int error = launch(static_cast<const std::byte*>(device_image), stream);
    if (error != 0) return error;
  }
  return 0;
}

Plan plan_step(std::span<const Problem<float>> problems, const Options& options,
               const DeviceInputs& inputs, const Products& products, void* workspace) {
  return StepPlan(problems, options, inputs, products, workspace).build();
}

bool serves(const Plan& plan, const Options& options) {
  Options before = plan.inputs->options;
  before.grad_scale = options.grad_scale;
  return before == options;
}

void renew_step(Plan& plan, std::span<const Problem<float>> problems, const Options& options,
                const DeviceInputs& inputs) {
  *plan.inputs = {options, inputs};
  // The matrices are what the plan of a group puts into its image first.
  auto* matrices = reinterpret_cast<MatrixOnDevice*>(plan.image.data());
  std::transform(problems.begin(), problems.end(), matrices, matrix_on_device);
}

int64_t step_workspace_bytes(const Problem<float>& p, const Options& options) {
  return StepArrays(p, options).total() * static_cast<int64_t>(sizeof(float));
}

}  // namespace dykaf::cuda
