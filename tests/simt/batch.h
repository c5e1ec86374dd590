// Lists of matrices as operations take them, and checks of a plan's run over them.
#pragma once

#include "cuda/kernels/matrices.h"
#include "matrix_case.h"

namespace kernel_check {

using dykaf::cuda::DeviceInputs;
using dykaf::cuda::MatmulPrecision;
using dykaf::cuda::Plan;

// What a check runs on.
struct Scenario {
  std::vector<CaseSpec> specs;
  Options options = default_options();
  MatmulPrecision precision = MatmulPrecision::kHighest;
  float amp_scale = 1;  // 1: no pointer
  float lr = 0;         // 0: no pointer
  int32_t skip = 0;     // the flag; always on the device
  float update_size = 1;
  dykaf::cuda::Library* library = nullptr;  // computes all products that it may

  // The rule fits all sizes.
  dykaf::cuda::Products products() const {
    using dykaf::cuda::GemmForm;
    dykaf::cuda::Products products{precision, library};
    const dykaf::cuda::SizeRange all{1, 1 << 30};
    for (const GemmForm form : {GemmForm::kNN, GemmForm::kTN, GemmForm::kNT}) {
      products.rules.push_back({precision, form, all, all, all, /*by_library=*/true});
    }
    return products;
  }
  // Each matrix has its own.
  static dykaf::Rate given_rate(size_t i) {
    const auto k = static_cast<double>(i % 4);
    return {.lr = 0.03 * (1 + k), .weight_decay = 0.1 - 0.02 * k};
  }
  dykaf::Rate rate(size_t i) const {
    dykaf::Rate used = given_rate(i);
    if (lr != 0) used.lr = double{lr};
    return used;
  }
  reference::Settings settings(size_t i) const {
    return {options, options.grad_scale / double{amp_scale}, rate(i), precision};
  }
};

// The matrices of a scenario, always the same numbers.
class Batch {
 public:
  explicit Batch(const Scenario& scenario) {
    Rng rng(5);
    for (const CaseSpec& spec : scenario.specs) {
      cases.emplace_back(spec, scenario.options, rng);
      // Some updates are aligned in another way than their matrices' arrays.
      updates.push_back(randn(spec.m * spec.n, rng, cases.size() % 3 == 0 ? 1 : spec.offset));
      for (int64_t i = 0; i < updates.back().size(); ++i) updates.back()[i] *= scenario.update_size;
      problems.push_back(cases.back().problem(stream(problems.size())));
      problems.back().rate = Scenario::given_rate(problems.size() - 1);
      update_pointers.push_back(updates.back().get());
    }
    skip = Array<int32_t>(std::vector<int32_t>{scenario.skip});
    amp_scale = Array<float>(std::vector<float>{scenario.amp_scale});
    lr = Array<float>(std::vector<float>{scenario.lr});
    grad_max = Array<double>(static_cast<int64_t>(cases.size()), /*offset=*/0);
    find_grad_max();
    inputs = {grad_max.get(), skip.get(), scenario.amp_scale != 1 ? amp_scale.get() : nullptr,
              scenario.lr != 0 ? lr.get() : nullptr};
  }

  static uint64_t stream(size_t i) { return 100 + i; }

  // After a change of gradients.
  void find_grad_max() {
    for (size_t i = 0; i < cases.size(); ++i) {
      grad_max[static_cast<int64_t>(i)] = cases[i].grad_max();
    }
  }

  std::vector<std::byte> bytes() const {
    std::vector<std::byte> all;
    for (size_t i = 0; i < cases.size(); ++i) {
      const std::vector<std::byte> one = cases[i].bytes();
      all.insert(all.end(), one.begin(), one.end());
      append_bytes(all, updates[i]);
    }
    return all;
  }

  std::vector<MatrixCase> cases;
  std::vector<Array<float>> updates;
  std::vector<float*> update_pointers;
  std::vector<Problem<float>> problems;
  Array<int32_t> skip;
  Array<float> amp_scale, lr;
  Array<double> grad_max;
  DeviceInputs inputs{};
};

using MakePlan = std::function<Plan(Batch&, const Scenario&, void* workspace)>;
using Modify = std::function<void(Batch&)>;

inline Array<std::byte> run(Batch& batch, const Scenario& scenario, const MakePlan& make_plan) {
  return run([&](void* workspace) { return make_plan(batch, scenario, workspace); });
}

// Brings one matrix forward; returns its update if the plan writes one.
using Reference = std::function<Dense(reference::Matrix&, const reference::Settings&, size_t idx)>;

// The state, and the update where `reference` has one, must match after the plan's run. `modify`
// changes the batch before both.
inline void check_against_reference(const std::string& name, const Scenario& scenario,
                                    const MakePlan& make_plan, const Reference& reference,
                                    const Modify& modify = nullptr) {
  if (!is_wanted(name)) return;
  const auto start = [&] {
    Batch batch(scenario);
    if (modify) modify(batch);
    return batch;
  };
  std::vector<reference::Matrix> expected;
  std::vector<Dense> updates;
  g_errors = errors_at(scenario.precision);
  for (const MatrixCase& c : start().cases) {
    expected.push_back(c.reference());
    updates.push_back(
        reference(expected.back(), scenario.settings(updates.size()), updates.size()));
  }
  check_schedules(name, [&] {
    Batch batch = start();
    run(batch, scenario, make_plan);
    for (size_t i = 0; i < expected.size(); ++i) {
      require_matches(batch.cases[i], expected[i], scenario.options, Batch::stream(i));
      if (!updates[i].is_null()) require_close("update", batch.updates[i], updates[i]);
    }
    return batch.bytes();
  });
}

// The whole step, and what it must come to.
inline Plan step_plan(Batch& b, const Scenario& s, void* workspace) {
  return dykaf::cuda::plan_step(b.problems, s.options, b.inputs, s.products(), workspace);
}

inline Dense step_reference(reference::Matrix& p, const reference::Settings& s, size_t) {
  reference::step(p, s);
  return {};
}

// No bit of the state changes.
inline void check_unchanged(const std::string& name, const Scenario& scenario,
                            const MakePlan& make_plan, const Modify& modify) {
  check_schedules(name, [&] {
    Batch batch(scenario);
    modify(batch);
    const std::vector<std::byte> before = batch.bytes();
    run(batch, scenario, make_plan);
    require("the state stays as it was", batch.bytes() == before);
    return before;
  });
}

// With the skip flag set nothing may change: no bit of the state, and of the workspace no more than
// the scalars, for no kernel does anything, but a library does. (A NaN in a gradient is why there
// is a flag.)
inline void check_skip(const std::string& name, Scenario scenario, const MakePlan& make_plan) {
  scenario.skip = 1;
  check_schedules("skip " + name, [&] {
    Batch batch(scenario);
    for (size_t i = 0; i < batch.cases.size(); ++i) {
      const MatrixCase& c = batch.cases[i];
      c.grad.set(0, std::nanf(""));
      // Zeros everywhere take a way of their own.
      if (i % 2 == 1)
        std::fill_n(static_cast<std::byte*>(c.grad.get()), c.grad.num_bytes(), std::byte{0});
    }
    batch.find_grad_max();
    const std::vector<std::byte> before = batch.bytes();
    const Array<std::byte> workspace = run(batch, scenario, make_plan);
    require("the state stays as it was", batch.bytes() == before);
    if (scenario.library != nullptr) return before;
    const auto scalars =
        static_cast<int64_t>(sizeof(dykaf::cuda::MatrixScalars) * batch.cases.size());
    for (int64_t i = scalars; i < workspace.size(); ++i) {
      require("the workspace stays as it was", workspace[i] == std::byte{0xff});
    }
    return before;
  });
}

}  // namespace kernel_check
