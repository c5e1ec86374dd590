// The operations on their own: rotations, Adam, the parameters' update.
#include "batch.h"
#include "cuda/kernels/second_moment.h"
#include "cuda/plan/on_device.h"
#include "cuda/plan/plan_builder.h"

namespace kernel_check {
namespace {

using namespace dykaf::cuda;

// Odd sizes, whole blocks and more than one, rows that are longer than a block is wide, arrays that
// start at odd addresses.
std::vector<CaseSpec> shapes() {
  return {
      {1, 1},
      {5, 3, Sides::kBoth, DType::kBFloat16},
      {33, 70, Sides::kLeft, DType::kFloat32, Master::kNo, 1},
      {64, 64, Sides::kBoth, DType::kFloat16, Master::kYes},
      {17, 303, Sides::kLeft, DType::kBFloat16, Master::kYes, 3},
      {300, 5, Sides::kRight, DType::kFloat32, Master::kYes},
      {70, 120, Sides::kBoth, DType::kFloat32, Master::kNo, 4},
      {70, 8, Sides::kRight, DType::kFloat16, Master::kNo, 8},
      {9, 520, Sides::kLeft, DType::kBFloat16, Master::kNo, 1},
  };
}

std::vector<CaseSpec> with_unsided(std::vector<CaseSpec> specs) {
  specs.push_back({19, 230, Sides::kNone});
  specs.push_back({70, 33, Sides::kNone, DType::kFloat16, Master::kNo, 1});
  specs.push_back({1, 4097, Sides::kVector});
  specs.push_back({1, 77, Sides::kVector, DType::kBFloat16, Master::kNo, 1});
  return specs;
}

// The outputs are the parameters' arrays, which this operation has no other use for.
void check_rotations(Rotation rotation, const std::string& name) {
  for (const MatmulPrecision precision :
       {MatmulPrecision::kHighest, MatmulPrecision::kHigh, MatmulPrecision::kMedium}) {
    Scenario scenario;
    scenario.precision = precision;
    for (CaseSpec spec : shapes()) {
      spec.dtype = DType::kFloat32;
      spec.master = Master::kNo;
      scenario.specs.push_back(spec);
    }
    std::vector<Dense> inputs;
    const Batch batch(scenario);
    for (size_t i = 0; i < batch.cases.size(); ++i) {
      inputs.push_back(dense(batch.updates[i], batch.cases[i].spec.m, batch.cases[i].spec.n));
    }
    check_against_reference(
        "rotate " + name + " " + std::to_string(static_cast<int>(precision)), scenario,
        [rotation](Batch& b, const Scenario& s, void* workspace) {
          std::vector<float*> outputs;
          for (const MatrixCase& c : b.cases) outputs.push_back(c.param.floats.get());
          return plan_rotate(b.problems, rotation, b.update_pointers.data(), outputs.data(),
                             s.products(), workspace);
        },
        [&](reference::Matrix& p, const reference::Settings& s, size_t i) {
          p.param = reference::rotate(p, rotation, inputs[i], s.precision);
          return inputs[i];
        });
  }
}

Plan adam_plan(Batch& b, const Scenario& s, void* workspace) {
  return plan_adam_update(b.problems, s.options, b.inputs, b.update_pointers.data(), workspace);
}

Dense adam_reference(reference::Matrix& p, const reference::Settings& s, size_t) {
  return reference::adam_update(p, reference::gradient(p, s), s);
}

// Every third gradient is a little too small to be more than rounding, and nothing came before.
void some_noise(Batch& batch) {
  for (const MatrixCase& c : batch.cases) {
    if (c.Q_L.size() == 0 && c.Q_R.size() == 0) continue;
    const double side =
        std::sqrt(std::max(c.Q_L.size() > 0 ? c.spec.m : 0, c.Q_R.size() > 0 ? c.spec.n : 0));
    const double noise = 16 * 0x1p-24 * side * c.grad_max();
    for (int64_t i = 1; i < c.spec.m * c.spec.n; i += 3) {
      c.grad.set(i, static_cast<float>(0.8 * noise));
      c.exp_avg[i] = 0;
      if (c.exp_avg_sq.size() > 0) c.exp_avg_sq[i] = 0;
    }
  }
  batch.find_grad_max();
}

// So large that the squares would overflow.
void large_gradients(Batch& batch) {
  for (const MatrixCase& c : batch.cases) {
    if (c.rho.size() == 0) continue;
    for (int64_t i = 0; i < c.spec.m * c.spec.n; ++i) c.grad.set(i, c.grad[i] * 0x1p100f);
    for (int64_t i = 0; i < c.spec.m * c.spec.n; ++i) c.exp_avg[i] = 0;
  }
  batch.find_grad_max();
}

// There the gradient counts as a smaller one, whose squares fit.
Dense large_adam_reference(reference::Matrix& p, const reference::Settings& s, size_t) {
  const double largest = std::exp2(std::ceil(std::log2(reference::largest_gradient(p, s))));
  const double size = std::sqrt(static_cast<double>(p.grad.m * p.grad.n));
  const double most = std::exp2(61 - std::floor(std::log2(size)));
  if (p.is_matrix && largest > most) {
    for (Number& g : p.grad.x) g = g.value * (most / largest);
  }
  return reference::adam_update(p, reference::gradient(p, s), s);
}

void check_adam() {
  const std::pair<SecondMoment, const char*> forms[] = {{SecondMoment::kFull, "full"},
                                                        {SecondMoment::kRankOne, "rank_one"},
                                                        {SecondMoment::kFactored, "factored"},
                                                        {SecondMoment::kNone, "momentum"}};
  for (const auto& [second_moment, name] : forms) {
    Scenario scenario;
    scenario.specs = with_unsided(shapes());
    scenario.options.second_moment = second_moment;
    const std::string prefix = std::string("adam ") + name;
    check_against_reference(prefix, scenario, adam_plan, adam_reference);
    check_skip(prefix, scenario, adam_plan);
    Scenario negated = scenario;
    negated.options.grad_scale = -1;
    check_against_reference(prefix + " noise", negated, adam_plan, adam_reference, some_noise);
    Scenario wide_range = scenario;
    std::erase_if(wide_range.specs, [](const CaseSpec& c) { return c.dtype == DType::kFloat16; });
    check_against_reference(prefix + " large gradients", wide_range, adam_plan,
                            large_adam_reference, large_gradients);
    // Scaled and negated gradients; the first step.
    Scenario scaled = scenario;
    scaled.options.grad_scale = -1;
    scaled.amp_scale = 48;
    check_against_reference(prefix + " scaled", scaled, adam_plan, adam_reference,
                            [](Batch& batch) {
                              for (const MatrixCase& c : batch.cases) c.step[0] = 0;
                            });
    Scenario nesterov = scenario;
    nesterov.options.nesterov = true;
    check_against_reference(prefix + " nesterov", nesterov, adam_plan, adam_reference);
    // What lies outside of the matrix is 0 / 0.
    Scenario no_eps = scenario;
    no_eps.options.eps = 0;
    check_against_reference(prefix + " no eps", no_eps, adam_plan, adam_reference);
    // The root of the second moment vanishes.
    check_against_reference(prefix + " zero gradient", scenario, adam_plan, adam_reference,
                            [](Batch& batch) {
                              for (const MatrixCase& c : batch.cases) {
                                for (int64_t i = 0; i < c.spec.m * c.spec.n; ++i) c.grad.set(i, 0);
                                for (int64_t i = 0; i < c.row.size(); ++i) c.row[i] = 0;
                                for (int64_t i = 0; i < c.exp_avg_sq.size(); ++i)
                                  c.exp_avg_sq[i] = 0;
                              }
                              batch.find_grad_max();
                            });
  }
}

// The vectors of rank_one are not read before the first update.
void check_rank_one_start() {
  Scenario scenario;
  scenario.specs = shapes();
  scenario.options.second_moment = SecondMoment::kRankOne;
  const auto start = [](Batch& batch) {
    for (const MatrixCase& c : batch.cases) {
      c.scale[0] = 0;
      c.step[0] = 0;
      for (int64_t i = 0; i < c.row.size(); ++i) c.row[i] = std::nanf("");
      for (int64_t i = 0; i < c.col.size(); ++i) c.col[i] = std::nanf("");
    }
  };
  check_against_reference("adam rank_one from zero", scenario, adam_plan, adam_reference, start);
  // A small gradient after large ones.
  check_against_reference("adam rank_one large scale", scenario, adam_plan, adam_reference,
                          [](Batch& batch) {
                            for (const MatrixCase& c : batch.cases) c.scale[0] = 7;
                          });
  // Nor does a zero gradient move them: they become the constant vectors. The update is momentum
  // over eps.
  check_against_reference("adam rank_one from zero, zero gradient", scenario, adam_plan,
                          adam_reference, [&](Batch& batch) {
                            start(batch);
                            for (const MatrixCase& c : batch.cases) {
                              for (int64_t i = 0; i < c.spec.m * c.spec.n; ++i) c.grad.set(i, 0);
                            }
                            batch.find_grad_max();
                          });
}

// The sums of squares in arrays that end where they end: in a step they lie in the workspace, where
// nobody sees what is beyond.
std::vector<std::byte> moment_sums(SecondMoment second_moment) {
  Scenario scenario;
  scenario.specs = {{13, 37}, {1, 1}, {9, 64}, {70, 33}};
  scenario.options.second_moment = second_moment;
  const Batch batch(scenario);
  MatrixScalars active{};
  active.active = 1;
  const Array<MatrixScalars> scalars(std::vector<MatrixScalars>(batch.cases.size(), active));
  const Array<MatrixOnDevice> matrices(matrices_on_device(batch.problems));
  Rng rng(12);
  std::vector<Array<float>> H;
  std::vector<Array<double>> rows, cols, u;
  std::vector<MomentProblem> problems;
  for (const MatrixCase& c : batch.cases) {
    const auto [m, n] = std::pair{c.spec.m, c.spec.n};
    H.push_back(randn(m * n, rng));
    rows.emplace_back(m);
    cols.emplace_back(n);
    u.emplace_back(m);
    for (int64_t i = 0; i < m; ++i) u.back()[i] = double{c.row[i]} + 1;
    MomentProblem q{};
    q.H = H.back().get();
    q.row_sums = rows.back().get();
    q.col_sums = cols.back().get();
    q.u = second_moment == SecondMoment::kRankOne ? u.back().get() : nullptr;
    q.matrix_idx = static_cast<int32_t>(problems.size());
    problems.push_back(q);
  }
  for (const MomentStage stage : {MomentStage::kRowSums, MomentStage::kColSums}) {
    const int64_t grid = assign_tiles(problems, [&](const MomentProblem& q) {
      const CaseSpec& spec = scenario.specs[static_cast<size_t>(q.matrix_idx)];
      return moment_tiles(stage, spec.m, spec.n);
    });
    const Array<MomentProblem> device_problems(problems);
    const auto num = static_cast<int32_t>(problems.size());
    require("launch",
            launch_moment(stage, {device_problems.get(), num, grid},
                          {matrices.get(), scalars.get(), num, adam_options(scenario.options)},
                          scenario.options.beta2, nullptr) == 0);
  }
  std::vector<std::byte> bytes;
  for (size_t i = 0; i < H.size(); ++i) {
    const MatrixCase& c = batch.cases[i];
    const bool rank_one = second_moment == SecondMoment::kRankOne;
    const auto square = [&](int64_t row, int64_t col) {
      const double h = H[i][row * c.spec.n + col];
      return h * h;
    };
    for (int64_t row = 0; row < c.spec.m; ++row) {
      double sum = 0;
      for (int64_t j = 0; j < c.spec.n; ++j) sum += square(row, j) * (rank_one ? c.col[j] : 1.0);
      require_close("row sum", rows[i][row], sum, sum * 1e-13);  // doubles, 70 of them at most
    }
    for (int64_t col = 0; col < c.spec.n; ++col) {
      double sum = 0;
      for (int64_t j = 0; j < c.spec.m; ++j) sum += square(j, col) * (rank_one ? u[i][j] : 1.0);
      require_close("column sum", cols[i][col], sum, sum * 1e-13);
    }
    append_bytes(bytes, rows[i]);
    append_bytes(bytes, cols[i]);
  }
  return bytes;
}

Plan orthogonalize_plan(Batch& b, const Scenario& s, void* workspace) {
  return plan_orthogonalize(b.problems, s.options, b.inputs, s.products(), b.update_pointers.data(),
                            workspace);
}

void check_orthogonalize(const std::string& name, const Scenario& scenario) {
  const Batch batch(scenario);
  check_against_reference("orthogonalize " + name, scenario, orthogonalize_plan,
                          [&](reference::Matrix& p, const reference::Settings& s, size_t i) {
                            const CaseSpec& spec = scenario.specs[i];
                            const Dense D = dense(batch.updates[i], spec.m, spec.n);
                            return reference::orthogonalized(p, D, s);
                          });
}

void check_orthogonalize() {
  Scenario scenario;
  for (CaseSpec spec : shapes()) {
    spec.sides = Sides::kBoth;  // no use for factors
    scenario.specs.push_back(spec);
  }
  for (const MatmulPrecision precision :
       {MatmulPrecision::kHighest, MatmulPrecision::kHigh, MatmulPrecision::kMedium}) {
    scenario.precision = precision;
    for (const int64_t num_steps : {1, 2}) {
      scenario.options.orthogonalize = num_steps;
      check_orthogonalize(
          std::to_string(static_cast<int>(precision)) + ", steps " + std::to_string(num_steps),
          scenario);
    }
  }
  scenario.precision = MatmulPrecision::kHighest;
  check_skip("orthogonalize", scenario, orthogonalize_plan);
  Scenario momentum = scenario;
  momentum.options.second_moment = SecondMoment::kNone;
  check_orthogonalize("momentum", momentum);
  scenario.update_size = 0.1;
  scenario.options.nesterov = true;
  check_orthogonalize("of small updates", scenario);
  momentum.update_size = 0.1;
  check_orthogonalize("small momentum", momentum);
  check_against_reference(
      "orthogonalize zero", scenario, orthogonalize_plan,
      [&](reference::Matrix& p, const reference::Settings&, size_t i) {
        p.update_rms = 0;
        return Dense(scenario.specs[i].m, scenario.specs[i].n);
      },
      [](Batch& b) {
        for (const Array<float>& update : b.updates) std::fill_n(update.get(), update.size(), 0.0f);
      });
}

Plan apply_plan(Batch& b, const Scenario& s, void* workspace) {
  return plan_apply_update(b.problems, s.options, b.inputs, b.update_pointers.data(), workspace);
}

// Of a shard of every kind: whole, of later rows, of runs.
Place place_of_case(size_t i) {
  const Place places[] = {{0, 0, 0}, {1000, 0, 0}, {50, 7, 19}};
  return places[i % 3];
}

uint64_t element_of_whole(const Place& place, uint64_t i) {
  if (place.run == 0) return place.first + i;
  const uint64_t row = i / place.run;
  return place.first + row * place.stride + (i - row * place.run);
}

// Bit for bit: one product, one product and one difference in float32, then rounding.h.
void require_applied(const MatrixCase& before, const MatrixCase& after, const Array<float>& update,
                     const Scenario& scenario, uint64_t stream, const Place& place,
                     const Rate& rate) {
  const auto keep = static_cast<float>(1 - rate.lr * rate.weight_decay);
  const uint64_t key =
      rounding_key(scenario.options.seed, stream, static_cast<uint64_t>(before.step[0]));
  const bool has_master = before.master.size() > 0;
  TypedArray expected(1, before.spec.dtype, 0);
  for (int64_t i = 0; i < update.size(); ++i) {
    const float old = has_master ? before.master[i] : before.param[i];
    const float value = old * keep - static_cast<float>(rate.lr) * update[i];
    expected.set(0, value);
    if (before.spec.dtype != DType::kFloat32 && !has_master) {
      expected.bits[0] = rounded_stochastically(value, before.spec.dtype,
                                                random_bits(key, element_of_whole(place, i)));
    }
    require("param", after.param[i] == expected[0]);
    if (has_master) require("master", after.master[i] == value);
  }
}

void check_apply(const std::string& name, const Scenario& scenario) {
  check_schedules(name, [&] {
    const Batch before(scenario);
    Batch after(scenario);
    for (size_t i = 0; i < after.problems.size(); ++i) after.problems[i].place = place_of_case(i);
    run(after, scenario, apply_plan);
    for (size_t i = 0; i < after.cases.size(); ++i) {
      require_applied(before.cases[i], after.cases[i], before.updates[i], scenario,
                      Batch::stream(i), place_of_case(i), scenario.rate(i));
      require("step", after.cases[i].step[0] == before.cases[i].step[0]);
    }
    return after.bytes();
  });
}

void check_apply() {
  Scenario scenario;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const Master master : {Master::kNo, Master::kYes}) {
      for (const int64_t offset : {0, 1, 4, 8}) {
        scenario.specs.push_back({37, 113, Sides::kBoth, dtype, master, offset});
        scenario.specs.push_back({1, 8, Sides::kVector, dtype, master, offset});
      }
    }
  }
  check_apply("apply", scenario);
  check_skip("apply", scenario, apply_plan);
  scenario.lr = 0.25f;
  check_apply("apply lr on the device", scenario);
}

}  // namespace

void check_ops() {
  check_rotations(Rotation::kIntoBasis, "into the basis");
  check_rotations(Rotation::kOutOfBasis, "out of the basis");
  check_adam();
  check_rank_one_start();
  check_schedules("adam rank_one sums", [] { return moment_sums(SecondMoment::kRankOne); });
  check_schedules("adam factored sums", [] { return moment_sums(SecondMoment::kFactored); });
  check_orthogonalize();
  check_apply();
}

}  // namespace kernel_check
