// Matrix multiplications that end in Adam and in the parameter's update, in every block shape.
#include "batch.h"
#include "cuda/kernels/elements.h"
#include "cuda/kernels/gemm.h"
#include "cuda/kernels/prepare.h"
#include "cuda/plan/on_device.h"
#include "cuda/plan/plan_builder.h"

namespace kernel_check {
namespace {

using namespace dykaf::cuda;

constexpr int kDepth = 20;

Scenario scenario_of(TileClass tile_class) {
  Scenario scenario;
  scenario.specs = {{64, 64},
                    {33, 70, Sides::kBoth, DType::kBFloat16, Master::kNo, 1},
                    {70, 24, Sides::kBoth, DType::kFloat16, Master::kYes, 4},
                    {5, 3, Sides::kBoth, DType::kFloat32, Master::kYes},
                    {20, 76, Sides::kBoth, DType::kFloat16, Master::kNo, 8},
                    {9, 16, Sides::kBoth, DType::kBFloat16, Master::kYes, 3},
                    {20, 13, Sides::kBoth, DType::kBFloat16, Master::kYes}};
  if (tile_class == TileClass::kLarge) scenario.specs.push_back({132, 140});
  return scenario;
}

// The operands [m, k] and [k, n] of each matrix: the same for plan and reference.
struct Operands {
  std::vector<Array<float>> A, B;

  explicit Operands(const Scenario& scenario) {
    Rng rng(6);
    for (const CaseSpec& spec : scenario.specs) {
      A.push_back(randn(spec.m * kDepth, rng));
      B.push_back(randn(spec.n * kDepth, rng));
    }
  }

  Dense product(const CaseSpec& spec, size_t i) const {
    return multiplied(dense(A[i], spec.m, kDepth), dense(B[i], kDepth, spec.n),
                      MatmulPrecision::kHighest);
  }
};

// The scalars, then all multiplications in one launch. As in a step, Adam's product is the gradient
// over tau and goes to D, here scratch.
Plan plan(Batch& b, const Scenario& scenario, void* workspace, const Operands& operands,
          TileClass tile_class, Epilogue epilogue) {
  const auto num = static_cast<int32_t>(b.problems.size());
  Plan made;
  const auto take = [&](int64_t bytes) {
    const int64_t start = made.workspace_bytes;
    made.workspace_bytes += (bytes + 255) / 256 * 256;
    return static_cast<std::byte*>(workspace) + (workspace != nullptr ? start : 0);
  };
  auto* scalars = reinterpret_cast<MatrixScalars*>(take(int64_t{num} * sizeof(MatrixScalars)));
  const auto problems = std::make_shared<std::vector<GemmProblem>>();
  for (size_t i = 0; i < b.problems.size(); ++i) {
    const Problem<float>& p = b.problems[i];
    GemmProblem g{};
    g.A = operands.A[i].get();
    g.B = operands.B[i].get();
    g.m = static_cast<int32_t>(p.m);
    g.n = static_cast<int32_t>(p.n);
    g.k = kDepth;
    g.matrix_idx = static_cast<int32_t>(i);
    g.epilogue = epilogue;
    if (epilogue == Epilogue::kAdam) {
      g.D = reinterpret_cast<float*>(take(p.size() * 4));
      g.update = b.update_pointers[i];
      g.partials = reinterpret_cast<double*>(
          take(num_tiles(tile_class, GemmForm::kNN, p.m, p.n) * kNumSums * 8));
    }
    problems->push_back(g);
  }
  const int64_t grid = assign_tiles(*problems, [&](const GemmProblem& g) {
    return num_tiles(tile_class, GemmForm::kNN, g.m, g.n);
  });
  const Array<MatrixOnDevice> matrices(matrices_on_device(b.problems));
  const auto group = [=] {  // keeps the matrices
    return Group{matrices.get(), scalars, num, adam_options(scenario.options)};
  };
  made.launches.push_back([=, inputs = b.inputs](const std::byte*, Stream stream) {
    return launch_prepare(group(), scenario.options, inputs,
                          epilogue == Epilogue::kAdam ? StepCount::kAdvance : StepCount::kKeep,
                          stream);
  });
  made.launches.push_back([=](const std::byte*, Stream stream) {
    const Array<GemmProblem> device_problems(*problems);
    const Array<AdamOptions> adam(std::vector{group().adam});
    const GemmLaunch launch{device_problems.get(), matrices.get(), scalars, num, grid, adam.get()};
    return launch_gemm(MatmulPrecision::kHighest, GemmForm::kNN, tile_class, launch, stream);
  });
  if (epilogue == Epilogue::kAdam) {
    made.launches.push_back([=](const std::byte*, Stream stream) {
      std::vector<RmsProblem> sums;
      for (const GemmProblem& g : *problems) {
        const auto tiles = static_cast<int32_t>(num_tiles(tile_class, GemmForm::kNN, g.m, g.n));
        sums.push_back({g.partials, tiles, kNumSums, g.matrix_idx});
      }
      const Array<RmsProblem> device_sums(sums);
      return launch_update_rms({device_sums.get(), num, num}, group(), stream);
    });
  }
  return made;
}

void check_epilogue(const std::string& name, TileClass tile_class, Epilogue epilogue,
                    const Options& options) {
  Scenario scenario = scenario_of(tile_class);
  scenario.options = options;
  const Operands operands(scenario);
  const MakePlan make_plan = [&](Batch& b, const Scenario& s, void* workspace) {
    return plan(b, s, workspace, operands, tile_class, epilogue);
  };
  const Batch batch(scenario);
  const auto product = [&](size_t i) { return operands.product(scenario.specs[i], i); };
  // tau: the least power of two that is not below max|grad| and rho.
  const auto tau = [&](size_t i) {
    const MatrixCase& c = batch.cases[i];
    return std::exp2(std::ceil(std::log2(std::max({c.grad_max(), c.rho[0], c.rho[1]}))));
  };
  check_against_reference("epilogue " + name, scenario, make_plan,
                          [&](reference::Matrix& p, const reference::Settings& s, size_t i) {
                            if (epilogue == Epilogue::kAdam) {
                              return reference::adam_update(
                                  p, reference::scaled(tau(i), product(i)), s);
                            }
                            reference::apply_update(p, product(i), s);
                            return Dense();
                          });
  check_skip("epilogue " + name, scenario, make_plan);
}

}  // namespace

void check_epilogues() {
  const std::pair<TileClass, const char*> tiles[] = {{TileClass::kLarge, "large"},
                                                     {TileClass::kMedium, "medium"},
                                                     {TileClass::kWide, "wide"},
                                                     {TileClass::kTall, "tall"}};
  for (const auto& [tile_class, name] : tiles) {
    check_epilogue(std::string("adam ") + name, tile_class, Epilogue::kAdam, default_options());
    // What lies outside of the matrix is 0 / 0.
    Options no_eps = default_options();
    no_eps.eps = 0;
    check_epilogue(std::string("adam ") + name + ", no eps", tile_class, Epilogue::kAdam, no_eps);
    Options nesterov = default_options();
    nesterov.nesterov = true;
    check_epilogue(std::string("adam ") + name + ", nesterov", tile_class, Epilogue::kAdam,
                   nesterov);
    check_epilogue(std::string("parameter ") + name, tile_class, Epilogue::kParameter,
                   default_options());
  }
}

}  // namespace kernel_check
