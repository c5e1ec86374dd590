// Products that a library computes, with cublas_on_host.cpp in its place: operands by columns, the
// epilogues that follow, how many calls there are, and which products stay with the kernels.
#include "batch.h"
#include "cublas_on_host.h"

namespace kernel_check {
namespace {

using namespace dykaf::cuda;

Library& library() {
  static const std::unique_ptr<Library> cublas = make_cublas(&simt::find_cublas_on_host);
  return *cublas;
}

// Pairs of one shape, shapes that differ in one side alone, every choice of sides and dtype.
std::vector<CaseSpec> group() {
  return {
      {20, 34},
      {34, 20, Sides::kBoth, DType::kBFloat16},
      {20, 34, Sides::kBoth, DType::kFloat16, Master::kYes, 1},
      {20, 35, Sides::kBoth, DType::kFloat32, Master::kYes},
      {1, 50, Sides::kVector},
      {21, 34, Sides::kLeft, DType::kFloat32, Master::kNo, 3},
      {34, 20, Sides::kBoth, DType::kFloat32},
      {20, 34, Sides::kLeft, DType::kBFloat16},
      {34, 21, Sides::kRight, DType::kBFloat16, Master::kYes},
      {34, 21, Sides::kRight},
      {70, 4, Sides::kRight, DType::kFloat16},
      {18, 40, Sides::kNone},
  };
}

struct Form {
  const char* name;
  Integrator integrator;
  SecondMoment second_moment;
  MatmulPrecision precision;
  int64_t orthogonalize = 0;
  bool nesterov = false;
};

constexpr MatmulPrecision kHigh = MatmulPrecision::kHigh;
constexpr MatmulPrecision kMedium = MatmulPrecision::kMedium;
constexpr Form kForms[] = {
    {"ksl high", Integrator::kKsl, SecondMoment::kFull, kHigh},
    {"ksl medium", Integrator::kKsl, SecondMoment::kFull, kMedium},
    {"bug", Integrator::kBug, SecondMoment::kFull, kHigh},
    {"rank_one", Integrator::kDiagonal, SecondMoment::kRankOne, kHigh},
    {"momentum", Integrator::kDiagonal, SecondMoment::kNone, kHigh, 0, true},
    {"orthogonalize high", Integrator::kDiagonal, SecondMoment::kFull, kHigh, 2, true},
    {"orthogonalize medium", Integrator::kDiagonal, SecondMoment::kFull, kMedium, 1, true},
    {"orthogonalize momentum", Integrator::kDiagonal, SecondMoment::kNone, kHigh, 2, true},
};

Scenario scenario_of(const Form& form) {
  Scenario scenario;
  scenario.specs = group();
  scenario.options.integrator = form.integrator;
  scenario.options.second_moment = form.second_moment;
  scenario.options.orthogonalize = form.orthogonalize;
  scenario.options.nesterov = form.nesterov;
  scenario.precision = form.precision;
  scenario.library = &library();
  return scenario;
}

// The batches that a step asks for.
std::vector<simt::LibraryCall> calls_of(const Scenario& scenario) {
  Batch batch(scenario);
  simt::library_calls().clear();
  run(batch, scenario, step_plan);
  return simt::library_calls();
}

// Two matrices of a shape are one call, four of them the same number of calls.
void check_calls() {
  check_once("library calls", [] {
    Scenario scenario = scenario_of(kForms[0]);
    const auto num_calls = [&](const std::vector<CaseSpec>& specs) {
      scenario.specs = specs;
      return calls_of(scenario);
    };
    // Both sides: two rotations into the basis, two out of it, H R and L H.
    const CaseSpec matrix{20, 34};
    for (const auto& call : num_calls({matrix})) {
      require("one product is no batch", !call.is_batched && call.count == 1);
    }
    for (const size_t num : {2, 4}) {
      const auto calls = num_calls(std::vector(num, matrix));
      require("calls of a shape: " + std::to_string(calls.size()), calls.size() == 6);
      for (const auto& call : calls) {
        require("all in one", call.is_batched && call.count == static_cast<int>(num));
        require("D^T is asked for", call.m == 34 && call.n == 20);
      }
    }
    for (const MatmulPrecision precision : {kHigh, kMedium}) {
      scenario.precision = precision;
      for (const auto& call : num_calls({matrix})) {
        require("bfloat16 at medium alone", call.is_bfloat16 == (precision == kMedium));
      }
    }
    require("another shape, another call", num_calls({matrix, {20, 35}, matrix}).size() == 12);
  });
}

void check_what_stays() {
  check_once("library what stays", [] {
    Scenario scenario = scenario_of(kForms[0]);
    scenario.specs = {{20, 34}, {34, 20, Sides::kRight}};
    scenario.options.orthogonalize = 2;
    // Of ksl on both sides 6 products, of one side 2, of either two Newton-Schulz steps: the
    // symmetric products of those and of the factors are not among them.
    require("plain products", calls_of(scenario).size() == 6 + 2 + 2 * 2);
    scenario.precision = MatmulPrecision::kHighest;
    require("none in full precision", calls_of(scenario).empty());

    scenario.precision = kHigh;
    Products products = scenario.products();
    require("by the rule", products.are_by_library(GemmForm::kNN, 20, 34, 34));
    require("not of symmetric results", !products.are_by_library(GemmForm::kSymmetricNT, 9, 9, 9));
    const ProductRule fits{kHigh, GemmForm::kNN, {20, 20}, {30, 40}, {34, 99}, false};
    for (auto change : {&ProductRule::m, &ProductRule::n, &ProductRule::k}) {
      ProductRule rule = fits;
      (rule.*change).least = 100;
      (rule.*change).most = 200;
      products.rules.insert(products.rules.begin(), rule);
      require("a rule of other sizes", products.are_by_library(GemmForm::kNN, 20, 34, 34));
    }
    ProductRule other = fits;
    other.precision = kMedium;
    products.rules.insert(products.rules.begin(), other);
    other = fits;
    other.form = GemmForm::kTN;
    products.rules.insert(products.rules.begin(), other);
    require("a rule of others", products.are_by_library(GemmForm::kNN, 20, 34, 34));
    products.rules.insert(products.rules.begin(), fits);
    require("the first that fits decides", !products.are_by_library(GemmForm::kNN, 20, 34, 34));
    require("ends of a range belong to it", products.are_by_library(GemmForm::kNN, 20, 41, 34));
    products.rules.clear();
    require("without a rule the kernels", !products.are_by_library(GemmForm::kNN, 20, 34, 34));
    products = scenario.products();
    products.library = nullptr;
    require("without a library, too", !products.are_by_library(GemmForm::kNN, 20, 34, 34));
  });
}

// A skinny matrix's own products stay in full precision.
void check_skinny() {
  Scenario scenario = scenario_of(kForms[3]);
  scenario.specs = {{8, 264, Sides::kLeft, DType::kFloat32, Master::kNo, 0, 1, 12},
                    {264, 8, Sides::kRight, DType::kFloat32, Master::kNo, 0, 1, 12}};
  scenario.options.second_moment = SecondMoment::kFull;
  check_against_reference("library skinny step", scenario, step_plan, step_reference);
  check_once("library skinny calls",
             [&] { require("the rotations alone", calls_of(scenario).size() == 4); });
}

Plan rotate_plan(Batch& b, const Scenario& s, void* workspace) {
  std::vector<float*> outputs;
  for (const MatrixCase& c : b.cases) outputs.push_back(c.param.floats.get());
  return plan_rotate(b.problems, Rotation::kOutOfBasis, b.update_pointers.data(), outputs.data(),
                     s.products(), workspace);
}

void check_rotation() {
  Scenario scenario = scenario_of(kForms[0]);
  scenario.specs = {{20, 34}, {20, 34}, {34, 21, Sides::kRight}, {21, 34, Sides::kLeft}};
  const Batch batch(scenario);
  check_against_reference("library rotate", scenario, rotate_plan,
                          [&](reference::Matrix& p, const reference::Settings& s, size_t i) {
                            const CaseSpec& spec = scenario.specs[i];
                            const Dense input = dense(batch.updates[i], spec.m, spec.n);
                            p.param =
                                reference::rotate(p, Rotation::kOutOfBasis, input, s.precision);
                            return input;
                          });
}

// Operands that BLAS would refuse are not passed over.
void check_errors() {
  check_once("library errors", [] {
    require("without all functions there is none", make_cublas([](const char* name) {
                                                     return std::string(name) == "cublasGemmEx"
                                                                ? nullptr
                                                                : simt::find_cublas_on_host(name);
                                                   }) == nullptr);
    const Array<float> X(100);
    const Array<std::byte> workspace(kLibraryWorkspaceBytes);
    BlasBatch batch = column_major(GemmForm::kNN, 4, 5, 6);
    batch.precision = kHigh;
    batch.count = 1;
    batch.first_a = batch.first_b = batch.first_d = X.get();
    batch.workspace = workspace.get();
    batch.lda = 4;
    std::string message;
    try {
      library().multiply(batch, nullptr);
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    require("what it said: " + message, message == "cublasGemmEx: cuBLAS returned status 7");
  });
}

}  // namespace

void check_library() {
  for (const Form& form : kForms) {
    const std::string name = std::string("library step ") + form.name;
    check_against_reference(name, scenario_of(form), step_plan, step_reference);
    check_skip(name, scenario_of(form), step_plan);
  }
  Scenario fading = scenario_of(kForms[5]);
  fading.options.eps = 3;
  check_against_reference("library step small updates", fading, step_plan, step_reference);
  check_calls();
  check_what_stays();
  check_skinny();
  check_rotation();
  check_errors();
}

}  // namespace kernel_check
