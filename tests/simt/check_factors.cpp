// The integrator step of the factors, and what keeps them from harm.
#include "batch.h"
#include "cuda/kernels/factor_scalars.h"
#include "cuda/kernels/gemm.h"
#include "cuda/plan/on_device.h"

namespace kernel_check {
namespace {

using namespace dykaf::cuda;

Plan factor_plan(Batch& b, const Scenario& s, void* workspace) {
  return plan_factor_update(b.problems, s.options, b.inputs, s.products(), workspace);
}

Dense factor_reference(reference::Matrix& p, const reference::Settings& s, size_t) {
  reference::factor_update(p, reference::gradient(p, s), s);
  return {};
}

struct Form {
  const char* name;
  Integrator integrator;
};
constexpr Form kForms[] = {
    {"ksl", Integrator::kKsl}, {"bug", Integrator::kBug}, {"diagonal", Integrator::kDiagonal}};

Scenario scenario_of(const Form& form, std::vector<CaseSpec> specs) {
  Scenario scenario;
  scenario.specs = std::move(specs);
  scenario.options.integrator = form.integrator;
  return scenario;
}

std::vector<CaseSpec> shapes() {
  return {{40, 40},
          {70, 33, Sides::kBoth, DType::kBFloat16},
          {33, 71, Sides::kBoth, DType::kFloat32, Master::kNo, 1},
          {64, 64, Sides::kBoth, DType::kFloat16},
          {8, 200},
          {200, 8},
          {1, 5, Sides::kBoth, DType::kFloat32, Master::kNo, 4},
          {5, 1}};
}

std::vector<CaseSpec> one_sided_shapes() {
  return {{70, 130, Sides::kLeft},
          {130, 70, Sides::kRight},
          {33, 19, Sides::kLeft, DType::kBFloat16, Master::kNo, 1},
          {19, 33, Sides::kRight, DType::kFloat16, Master::kNo, 3},
          {1, 9, Sides::kLeft},
          {9, 1, Sides::kRight}};
}

std::vector<CaseSpec> few_shapes(double size) {
  std::vector<CaseSpec> specs = {
      {20, 12}, {9, 33}, {20, 12, Sides::kLeft}, {12, 20, Sides::kRight}};
  for (CaseSpec& spec : specs) spec.size = size;
  return specs;
}

void check_values(const Form& form) {
  const std::string name = std::string("factors ") + form.name;
  check_against_reference(name, scenario_of(form, shapes()), factor_plan, factor_reference,
                          [](Batch& batch) {
                            // A gradient beyond rho.
                            batch.cases[1].rho[0] = batch.cases[1].rho[1] = 1e-3;
                          });
  Scenario scaled = scenario_of(form, shapes());
  scaled.options.grad_scale = -1;
  scaled.amp_scale = 48;
  scaled.precision = MatmulPrecision::kHigh;
  check_against_reference(name + " scaled, high", scaled, factor_plan, factor_reference);
  check_skip(name, scenario_of(form, shapes()), factor_plan);
}

// Sizes of gradients from the smallest to the largest floats: the numbers inside stay near 1.
void check_sizes(const Form& form) {
  for (const double size : {2e-44, 1e-37, 1e-20, 1e20, 1e37, 2.5e38}) {
    char text[40];
    snprintf(text, sizeof text, "factors %s size %g", form.name, size);
    check_against_reference(text, scenario_of(form, few_shapes(size)), factor_plan,
                            factor_reference);
  }
  // A small gradient after large ones: it leaves no trace, and nothing overflows.
  check_against_reference(std::string("factors ") + form.name + " size far below rho",
                          scenario_of(form, few_shapes(2e-44)), factor_plan, factor_reference,
                          [](Batch& batch) {
                            for (const MatrixCase& c : batch.cases) c.rho[0] = c.rho[1] = 1e37;
                          });
  // A large gradient, turned round, after small ones.
  Scenario negated = scenario_of(form, few_shapes(1e20));
  negated.options.grad_scale = -1;
  check_against_reference(std::string("factors ") + form.name + " size negated", negated,
                          factor_plan, factor_reference, [](Batch& batch) {
                            for (const MatrixCase& c : batch.cases) c.rho[0] = c.rho[1] = 1;
                          });
}

void set_gradient(const MatrixCase& c, float value) {
  for (int64_t i = 0; i < c.spec.m * c.spec.n; ++i) c.grad.set(i, value);
}

// The second of the matrices has a gradient of zeros: rho alone decays, and the others go on.
void check_zero_gradient(const Form& form) {
  std::vector<CaseSpec> specs = few_shapes(1);
  specs.push_back(specs[0]);
  for (size_t i : {1, 2, 3}) specs.push_back(specs[i]);
  check_against_reference(std::string("factors ") + form.name + " zero gradient",
                          scenario_of(form, specs), factor_plan, factor_reference,
                          [](Batch& batch) {
                            for (size_t i : {1, 2, 3}) set_gradient(batch.cases[i], 0);
                            batch.find_grad_max();
                          });
  // The factors keep every bit.
  const Scenario scenario = scenario_of(form, few_shapes(1));
  check_schedules(std::string("factors ") + form.name + " zero gradient, bits", [&] {
    Batch batch(scenario);
    for (const MatrixCase& c : batch.cases) set_gradient(c, 0);
    batch.find_grad_max();
    const std::vector<std::byte> before = batch.bytes();
    run(batch, scenario, factor_plan);
    const Batch start(scenario);
    for (size_t i = 0; i < start.cases.size(); ++i) {
      for (const int side : {0, 1}) {
        const double old = start.cases[i].rho[side];
        double& rho = batch.cases[i].rho[side];
        require("rho decays", rho == old * std::sqrt(scenario.options.factor_beta));
        rho = old;
      }
    }
    require("the factors stay as they were", batch.bytes() == before);
    return before;
  });
}

// A gradient that is not finite, with no flag that says so.
void check_nan(const Form& form) {
  for (const float bad : {std::nanf(""), HUGE_VALF}) {
    check_unchanged(std::string("factors ") + form.name + (bad > 0 ? " infinity" : " NaN"),
                    scenario_of(form, few_shapes(1)), factor_plan, [bad](Batch& batch) {
                      for (const MatrixCase& c : batch.cases) c.grad.set(3, bad);
                      batch.find_grad_max();
                      batch.inputs.skip = nullptr;
                    });
  }
}

// New norms of zero: rho is zero and so is H R H^T (R lives where the gradient does not), or the
// gradient is one that has vanished from max|G|'s point of view alone.
void check_vanishing(const Form& form) {
  if (form.integrator != Integrator::kDiagonal) {
    Scenario scenario = scenario_of(form, {{20, 12}, {9, 33}});
    check_unchanged(std::string("factors ") + form.name + " vanishing increment", scenario,
                    factor_plan, [](Batch& batch) {
                      for (const MatrixCase& c : batch.cases) {
                        c.rho[0] = c.rho[1] = 0;
                        for (int64_t i = 0; i < c.R.size(); ++i) c.R[i] = i == 0 ? 1.0f : 0.0f;
                        for (int64_t i = 0; i < c.spec.m; ++i) c.grad.set(i * c.spec.n, 0);
                      }
                    });
  }
  check_unchanged(std::string("factors ") + form.name + " vanishing gradient",
                  scenario_of(form, few_shapes(1)), factor_plan, [](Batch& batch) {
                    for (size_t i = 0; i < batch.cases.size(); ++i) {
                      set_gradient(batch.cases[i], 0);
                      batch.cases[i].rho[0] = batch.cases[i].rho[1] = 0;
                      batch.grad_max[static_cast<int64_t>(i)] = 1;
                    }
                  });
}

// Sums over more tiles than a block has threads, which only matrices of thousands would leave.
std::vector<std::byte> many_tiles() {
  constexpr int64_t kTiles = 300;
  Scenario scenario = scenario_of(kForms[1], {{4, 4}});
  const Batch batch(scenario);
  Rng rng(9);
  std::vector<Array<double>> partials;
  double sums[3][kNumSums] = {};
  for (auto& sum : sums) {
    partials.emplace_back(kTiles * kNumSums);
    for (int64_t i = 0; i < kTiles * kNumSums; ++i) {
      partials.back()[i] = std::uniform_real_distribution<double>(0.1, 1)(rng);
      sum[i % kNumSums] += partials.back()[i];
    }
  }
  FactorProblem f{};
  f.left = partials[0].get();
  f.right = partials[1].get();
  f.coupling = partials[2].get();
  f.left_tiles = f.right_tiles = f.coupling_tiles = kTiles;
  f.stage = FactorStage::kBug;
  const Array<FactorProblem> problems(std::vector<FactorProblem>{f});
  const Array<MatrixOnDevice> matrices(matrices_on_device(batch.problems));
  const Array<MatrixScalars> scalars(std::vector<MatrixScalars>(1));
  MatrixScalars& s = scalars[0];
  s.active = 1;
  s.tau = 2;
  const double beta = scenario.options.factor_beta;
  const double a = beta * batch.cases[0].rho[0] * batch.cases[0].rho[0] / 4;
  const double b = 1 - beta;
  require("launch",
          launch_factor_scalars({problems.get(), 1, 1},
                                {matrices.get(), scalars.get(), 1, adam_options(scenario.options)},
                                beta, nullptr) == 0);
  const auto& [left, right, coupling] = sums;
  const auto norm = [&](const double (&x)[kNumSums]) {
    return std::sqrt(a * a * x[0] + 2 * a * b * x[1] + b * b * x[2]);
  };
  const double galerkin =
      a * (a * left[0] + b * left[1]) * (a * right[0] + b * right[1]) +
      b * (a * a * left[1] + a * b * (left[2] + right[2]) + b * b * coupling[1]);
  const double rho = 2 * std::sqrt(galerkin / (norm(left) * norm(right)));
  require_close("rho", batch.cases[0].rho[0], rho, rho * 1e-12);  // doubles, a few hundred of them
  require_close("keep of L", double{s.keep_factor[0]}, a / norm(left), kRoundoff);
  require_close("gain of R", double{s.gain[1]}, b / norm(right), kRoundoff);
  std::vector<std::byte> bytes;
  append_bytes(bytes, scalars);
  append_bytes(bytes, batch.cases[0].rho);
  return bytes;
}

}  // namespace

void check_factors() {
  for (const Form& form : kForms) {
    check_values(form);
    check_sizes(form);
    check_zero_gradient(form);
    check_nan(form);
    check_vanishing(form);
  }
  check_against_reference("factors one-sided", scenario_of(kForms[0], one_sided_shapes()),
                          factor_plan, factor_reference);
  check_skip("factors one-sided", scenario_of(kForms[0], one_sided_shapes()), factor_plan);
  check_schedules("factors many tiles", many_tiles);
}

}  // namespace kernel_check
