// What a plan launches: the number of launches does not hang on the number of matrices, and grids
// have the sizes that the kernels' comments give.
#include "batch.h"

namespace kernel_check {
namespace {

using namespace dykaf::cuda;

struct Launched {
  std::string kernel;  // without its template arguments
  unsigned grid;
  bool operator==(const Launched&) const = default;
};

std::vector<Launched> launches_of(const Scenario& scenario) {
  Batch batch(scenario);
  simt::reset();
  run(batch, scenario, step_plan);
  std::vector<Launched> launches;
  for (const simt::LaunchRecord& record : simt::launch_log()) {
    require("grids have one dimension", record.grid.y == 1 && record.grid.z == 1);
    const size_t begin = record.kernel.starts_with("(") ? 1 : 0;
    launches.push_back(
        {record.kernel.substr(begin, record.kernel.find('<') - begin), record.grid.x});
  }
  return launches;
}

std::vector<CaseSpec> repeated(const std::vector<CaseSpec>& specs, int times) {
  std::vector<CaseSpec> all;
  for (int i = 0; i < times; ++i) all.insert(all.end(), specs.begin(), specs.end());
  return all;
}

struct Form {
  const char* name;
  Integrator integrator;
  SecondMoment second_moment;
  // Launches of a step: of matrices with the medium block shape alone; of those, others with narrow
  // block shapes, one-sided ones and vectors; of those and a matrix with large block shapes.
  size_t medium;
  size_t mixed;
  size_t all;
  int64_t orthogonalize = 0;
};

// Medium: scalars, load, two products into the basis, update_rms, two products out of it are 7; ksl
// adds two products, scalars, blend for either side; bug four products, two for the coupling,
// scalars, blend; diagonal a product, scalars, blend for either side.
// rank_one has five launches more for Adam, factored four.
// Mixed: AdamW, which does a matrix without factors as well, and each product that is not symmetric
// has three grids instead of one: 4 of them in a step, ksl 2 more, bug 4 more. One-sided matrices
// are averaged, which gives bug a launch of scalars and of blending more. A compact second moment
// leaves a matrix without factors for a launch of its own that updates the parameter. All: one grid
// more for every product, with two symmetric ones. Orthogonalisation: normalising, the bound and
// update_rms; each of three steps has a Gram matrix, its square and a product, of mixed shapes two
// kinds of Gram matrix and three grids of the product. Without factors Adam and the parameter's
// update are launches of their own then.
constexpr Form kForms[] = {
    {"ksl", Integrator::kKsl, SecondMoment::kFull, 15, 28, 36},
    {"bug", Integrator::kBug, SecondMoment::kFull, 15, 34, 44},
    {"diagonal", Integrator::kDiagonal, SecondMoment::kFull, 13, 22, 28},
    {"rank_one", Integrator::kKsl, SecondMoment::kRankOne, 20, 34, 42},
    {"factored", Integrator::kKsl, SecondMoment::kFactored, 19, 33, 41},
    {"orthogonalize", Integrator::kKsl, SecondMoment::kFull, 18 + 3 * 3, 33 + 3 * 6, 41 + 3 * 9, 3},
};

// Large matrices are planned and not run.
size_t num_planned(const Scenario& scenario) {
  Batch batch(scenario);
  return step_plan(batch, scenario, nullptr).launches.size();
}

void require_count(const std::string& what, size_t found, size_t expected) {
  require(what + ": expected " + std::to_string(expected) + ", found " + std::to_string(found),
          found == expected);
}

void check_launch_counts(const Form& form) {
  check_once(std::string("plan launches ") + form.name, [&] {
    const std::vector<CaseSpec> medium = {{33, 33}, {34, 40}};
    std::vector<CaseSpec> mixed = {{8, 40},
                                   {40, 8},
                                   {40, 50, Sides::kLeft},
                                   {50, 40, Sides::kRight},
                                   {40, 50, Sides::kNone},
                                   {1, 7, Sides::kVector}};
    mixed.insert(mixed.end(), medium.begin(), medium.end());
    std::vector<CaseSpec> all = mixed;
    all.push_back({768, 768});
    Scenario scenario;
    scenario.options.integrator = form.integrator;
    scenario.options.second_moment = form.second_moment;
    scenario.options.orthogonalize = form.orthogonalize;
    for (const int times : {1, 3}) {
      scenario.specs = repeated(medium, times);
      require_count("medium", launches_of(scenario).size(), form.medium);
      scenario.specs = repeated(mixed, times);
      require_count("mixed", launches_of(scenario).size(), form.mixed);
      scenario.specs = repeated(all, times);
      require_count("all", num_planned(scenario), form.all);
    }
  });
}

// Beside "diagonal" of the medium block shape a wide skinny matrix has two rotations of a narrow
// shape, four kernels and two products of its own; a tall one two rotations and two products more.
void check_skinny_launches() {
  check_once("plan launches skinny", [] {
    Scenario scenario;
    scenario.options.integrator = Integrator::kDiagonal;
    const CaseSpec wide = {8, 264, Sides::kLeft, DType::kFloat32, Master::kNo, 0, 1, 12};
    const CaseSpec tall = {264, 8, Sides::kRight, DType::kFloat32, Master::kNo, 0, 1, 12};
    for (const int times : {1, 3}) {
      scenario.specs = repeated({{33, 33}, wide}, times);
      require_count("wide", launches_of(scenario).size(), 13 + 8);
      scenario.specs = repeated({{33, 33}, wide, tall}, times);
      require_count("wide and tall", launches_of(scenario).size(), 13 + 12);
    }
  });
}

// Two matrices of 100 x 70 in 64 x 64 tiles, and a vector.
void check_grids() {
  check_once("plan grids", [] {
    Scenario scenario;
    scenario.specs = {{100, 70}, {1, 9000, Sides::kVector}, {100, 70}};
    const std::vector<Launched> expected = {
        {"prepare_kernel", 1},
        {"elements_kernel", 3},    // AdamW: 9000 elements, 4096 in a block
        {"elements_kernel", 4},    // load: 7000
        {"gemm_kernel", 8},        // Q_L^T G
        {"gemm_kernel", 8},        // (.) Q_R
        {"update_rms_kernel", 3},  // one for each matrix
        {"gemm_kernel", 8},        // Q_L D
        {"gemm_kernel", 8},        // (.) Q_R^T
        {"gemm_kernel", 8},        // H R
        {"gemm_kernel", 6},        // (.) H^T: 3 of 4 tiles
        {"factor_scalars_kernel", 2},
        {"blend_kernel", 6},  // 10000 elements
        {"gemm_kernel", 8},   // L H
        {"gemm_kernel", 6},   // H^T (.)
        {"factor_scalars_kernel", 2},
        {"blend_kernel", 4},  // 4900 elements
    };
    const std::vector<Launched> found = launches_of(scenario);
    require("number of launches", found.size() == expected.size());
    for (size_t i = 0; i < found.size(); ++i) {
      require("launch " + std::to_string(i) + ": expected " + expected[i].kernel + " of " +
                  std::to_string(expected[i].grid) + ", found " + found[i].kernel + " of " +
                  std::to_string(found[i].grid),
              found[i] == expected[i]);
    }
  });
}

// A matrix's part of the workspace is what a group is cut into passes by: no more than a twentieth,
// for sums, vectors and alignment, comes on top.
void require_workspace(Scenario scenario, const CaseSpec& spec) {
  scenario.specs = {spec};
  Batch batch(scenario);
  const int64_t expected = step_workspace_bytes(batch.problems[0], scenario.options);
  const int64_t found = step_plan(batch, scenario, nullptr).workspace_bytes;
  const int64_t size = spec.m * spec.n * static_cast<int64_t>(sizeof(float));
  require(std::to_string(spec.m) + " x " + std::to_string(spec.n) + ": expected " +
              std::to_string(expected) + " bytes, found " + std::to_string(found),
          expected <= found && found <= expected + expected / 20 + size / 20);
}

void check_workspace() {
  check_once("plan workspace", [] {
    Scenario scenario;
    const std::vector<CaseSpec> specs = {
        {300, 200},
        {300, 200, Sides::kLeft},
        {300, 200, Sides::kRight},
        {300, 200, Sides::kNone},
        {1, 60000, Sides::kVector},
        {16, 2000, Sides::kLeft, DType::kFloat32, Master::kNo, 0, 1, 12}};
    const auto check = [&] {
      for (const int64_t orthogonalize : {0, 5}) {
        scenario.options.orthogonalize = orthogonalize;
        for (const CaseSpec& spec : specs) require_workspace(scenario, spec);
      }
    };
    for (const Integrator integrator :
         {Integrator::kKsl, Integrator::kBug, Integrator::kDiagonal}) {
      scenario.options.integrator = integrator;
      check();
    }
    scenario.options.second_moment = SecondMoment::kFactored;
    check();
  });
}

void check_nothing() {
  check_once("plan of nothing", [] {
    const Scenario scenario;
    require("nothing but the scalars' kernel is planned",
            plan_step({}, scenario.options, {}, {}, nullptr).launches.size() <= 1);
  });
}

}  // namespace

void check_plans() {
  for (const Form& form : kForms) check_launch_counts(form);
  check_skinny_launches();
  check_grids();
  check_workspace();
  check_nothing();
}

}  // namespace kernel_check
