// Whole steps over mixed groups of matrices, against the composition of the references.
#include "batch.h"

namespace kernel_check {
namespace {

using namespace dykaf::cuda;

// Every dtype, every block shape but the largest, every choice of sides, and arrays that start
// where nothing is aligned.
std::vector<CaseSpec> mixed_group() {
  return {
      {70, 40},
      {1, 1000, Sides::kVector},
      {40, 70, Sides::kBoth, DType::kFloat16, Master::kNo, 1},
      {8, 200},
      {200, 8, Sides::kBoth, DType::kBFloat16},
      {64, 64, Sides::kBoth, DType::kBFloat16, Master::kYes},
      {33, 90, Sides::kLeft, DType::kFloat32, Master::kNo, 3},
      {90, 33, Sides::kRight, DType::kFloat16, Master::kYes, 1},
      {1, 77, Sides::kVector, DType::kBFloat16, Master::kNo, 3},
      {3, 2, Sides::kBoth, DType::kFloat32, Master::kYes, 2},
      {5, 60, Sides::kLeft, DType::kBFloat16},
      {60, 5, Sides::kRight, DType::kFloat16},
      {1, 9, Sides::kVector, DType::kFloat16, Master::kYes},
      {72, 80, Sides::kRight, DType::kBFloat16, Master::kNo, 8},
      {50, 68, Sides::kNone, DType::kBFloat16, Master::kNo, 1},
      {90, 7, Sides::kNone, DType::kFloat32, Master::kYes, 3},
  };
}

struct Form {
  const char* name;
  Integrator integrator;
  SecondMoment second_moment;
  MatmulPrecision precision = MatmulPrecision::kHighest;
  int64_t orthogonalize = 0;
  bool nesterov = false;
};

constexpr Form kForms[] = {
    {"ksl", Integrator::kKsl, SecondMoment::kFull},
    {"ksl high", Integrator::kKsl, SecondMoment::kFull, MatmulPrecision::kHigh},
    {"ksl medium", Integrator::kKsl, SecondMoment::kFull, MatmulPrecision::kMedium},
    {"bug", Integrator::kBug, SecondMoment::kFull},
    {"diagonal", Integrator::kDiagonal, SecondMoment::kFull},
    {"rank_one", Integrator::kKsl, SecondMoment::kRankOne},
    {"factored", Integrator::kDiagonal, SecondMoment::kFactored},
    {"nesterov", Integrator::kKsl, SecondMoment::kFull, MatmulPrecision::kHighest, 0, true},
    {"orthogonalize", Integrator::kKsl, SecondMoment::kFull, MatmulPrecision::kHighest, 2},
    {"orthogonalize high", Integrator::kDiagonal, SecondMoment::kFull, MatmulPrecision::kHigh, 1,
     true},
    // Many of its updates lie at their bound: of one magnitude, their roundings to fewer bits would
    // not be independent.
    {"orthogonalize factored", Integrator::kDiagonal, SecondMoment::kFactored,
     MatmulPrecision::kHighest, 1, true},
    {"momentum", Integrator::kDiagonal, SecondMoment::kNone, MatmulPrecision::kHighest, 0, true},
    {"orthogonalize momentum", Integrator::kDiagonal, SecondMoment::kNone,
     MatmulPrecision::kHighest, 2, true},
};

Scenario scenario_of(const Form& form) {
  Scenario scenario;
  scenario.specs = mixed_group();
  scenario.options.integrator = form.integrator;
  scenario.options.second_moment = form.second_moment;
  scenario.options.orthogonalize = form.orthogonalize;
  scenario.options.nesterov = form.nesterov;
  scenario.precision = form.precision;
  return scenario;
}

// A long side without a factor leaves more sums than a warp has lanes, or a block threads.
void check_long_sides() {
  Scenario scenario;
  scenario.specs = {{40, 2200, Sides::kLeft},
                    {2200, 34, Sides::kRight, DType::kBFloat16},
                    {8, 16500, Sides::kLeft}};
  check_against_reference("step long sides", scenario, step_plan, step_reference);
}

// More matrices than a block of the first kernel has threads.
void check_many() {
  Scenario scenario;
  for (int i = 0; i < 130; ++i) scenario.specs.push_back({1, 1 + i % 9, Sides::kVector});
  scenario.specs.push_back({5, 6});
  check_against_reference("step many matrices", scenario, step_plan, step_reference);
}

}  // namespace

void check_steps() {
  for (const Form& form : kForms) {
    const std::string name = std::string("step ") + form.name;
    check_against_reference(name, scenario_of(form), step_plan, step_reference);
    check_skip(name, scenario_of(form), step_plan);
  }
  Scenario scaled = scenario_of(kForms[0]);
  scaled.options.grad_scale = -1;
  scaled.amp_scale = 48;
  scaled.lr = 0.25f;
  check_against_reference("step amp_scale and lr on the device", scaled, step_plan, step_reference);
  Scenario unflagged = scenario_of(kForms[0]);
  check_against_reference("step no inputs", unflagged, step_plan, step_reference,
                          [](Batch& batch) { batch.inputs.skip = nullptr; });
  check_long_sides();
  check_many();
}

}  // namespace kernel_check
