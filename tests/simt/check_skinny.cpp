// Steps of skinny matrices among others, against the references.
#include "batch.h"

namespace kernel_check {
namespace {

using namespace dykaf::cuda;

CaseSpec skinny(int64_t m, int64_t n, int64_t rank, DType dtype = DType::kFloat32,
                Master master = Master::kNo, int64_t offset = 0) {
  return {m, n, m < n ? Sides::kLeft : Sides::kRight, dtype, master, offset, 1, rank};
}

// Tails of every kind of tile, several tiles along either side, a rank of one, and arrays that
// start where nothing is aligned; among matrices of other kinds.
std::vector<CaseSpec> mixed_group() {
  return {
      skinny(8, 264, 12),
      {20, 30},
      skinny(264, 8, 9, DType::kBFloat16),
      skinny(1, 33, 1),
      skinny(3, 515, 7, DType::kFloat16, Master::kYes, 1),
      {1, 50, Sides::kVector},
      {9, 40, Sides::kNone},
      skinny(530, 33, 40, DType::kBFloat16, Master::kNo, 3),
      skinny(17, 290, 17, DType::kFloat32, Master::kYes, 2),
      {5, 60, Sides::kLeft},
      skinny(270, 10, 11),
  };
}

Scenario scenario_of(MatmulPrecision precision) {
  Scenario scenario;
  scenario.specs = mixed_group();
  scenario.options.integrator = Integrator::kDiagonal;
  scenario.precision = precision;
  return scenario;
}

// Gradients that V sees in full: what is left of their squares is rounding, of either sign.
void within_the_basis(Batch& batch) {
  Rng rng(9);
  for (MatrixCase& c : batch.cases) {
    if (c.spec.skinny_rank == 0) continue;
    const int64_t s = c.spec.short_side();
    const int64_t l = c.spec.long_side();
    const Array<float> mix = randn(s * c.rows[0], rng);
    for (int64_t i = 0; i < s; ++i) {
      for (int64_t j = 0; j < l; ++j) {
        float x = 0;
        for (int64_t k = 0; k < c.rows[0]; ++k) x += mix[i * c.rows[0] + k] * c.basis[k * l + j];
        c.grad.set(c.spec.m < c.spec.n ? i * l + j : j * s + i, x);
      }
    }
  }
  batch.find_grad_max();
}

// Zero gradients: rows of zeros that weigh nothing.
void zero_gradients(Batch& batch) {
  for (MatrixCase& c : batch.cases) {
    std::fill_n(static_cast<std::byte*>(c.grad.get()), c.grad.num_bytes(), std::byte{0});
  }
  batch.find_grad_max();
}

// In the first row of the short side the gradient is rounding; so is what V's last direction, a
// unit vector, sees of the others. Nothing came before in either.
void noise(Batch& batch) {
  for (MatrixCase& c : batch.cases) {
    if (c.spec.skinny_rank == 0) continue;
    const bool is_wide = c.spec.m < c.spec.n;
    const int64_t s = c.spec.short_side();
    const int64_t l = c.spec.long_side();
    const auto place = [&](int64_t i, int64_t j) { return is_wide ? i * l + j : j * s + i; };
    const Array<float>& Q = is_wide ? c.Q_L : c.Q_R;
    for (int64_t i = 0; i < s * s; ++i) Q[i] = i % (s + 1) == 0 ? 1.0f : 0.0f;
    for (int64_t k = 0; k < c.rows[0]; ++k) c.basis[k * l] = 0;
    const int64_t last = c.rows[0] - 1;
    for (int64_t j = 0; j < l; ++j) c.basis[last * l + j] = j == 0 ? 1.0f : 0.0f;
    const double entry = 16 * 0x1p-24 * std::sqrt(s) * c.grad_max();
    const double in_V = entry * std::sqrt(l);
    for (int64_t i = 0; i < s; ++i) {
      c.grad.set(place(i, 0), static_cast<float>(0.5 * in_V));
      c.exp_avg[place(i, 0)] = 0;
      c.exp_avg_sq[i * (c.spec.skinny_rank + 1) + last] = 0;
    }
    for (int64_t j = 0; s > 1 && j < l; ++j) {
      c.grad.set(place(0, j), static_cast<float>(0.5 * entry));
      c.exp_avg[place(0, j)] = 0;
    }
    for (int64_t k = 0; s > 1 && k <= c.spec.skinny_rank; ++k) c.exp_avg_sq[k] = 0;
  }
  batch.find_grad_max();
}

// Nothing has ever come.
void zero_rho(Batch& batch) {
  zero_gradients(batch);
  for (MatrixCase& c : batch.cases) {
    for (int64_t i = 0; i < c.rho.size(); ++i) c.rho[i] = 0;
  }
}

// Where both averages and the gradient are zero a trace cannot be had, and nothing moves.
Dense without_averages(reference::Matrix& p, const reference::Settings& s, size_t) {
  const Dense core = p.core;
  const Number flat = p.flat;
  reference::step(p, s);
  p.core = core;
  p.flat = flat;
  p.rho[0] = p.rho[1] = 0;
  return {};
}

}  // namespace

void check_skinny() {
  check_against_reference("skinny step", scenario_of(MatmulPrecision::kHighest), step_plan,
                          step_reference);
  check_against_reference("skinny step medium", scenario_of(MatmulPrecision::kMedium), step_plan,
                          step_reference);
  check_skip("skinny step", scenario_of(MatmulPrecision::kHighest), step_plan);
  Scenario scaled = scenario_of(MatmulPrecision::kHighest);
  scaled.options.grad_scale = -1;
  scaled.amp_scale = 48;
  scaled.lr = 0.25f;
  check_against_reference("skinny step amp_scale and lr on the device", scaled, step_plan,
                          step_reference);
  check_against_reference("skinny step within the basis", scenario_of(MatmulPrecision::kHighest),
                          step_plan, step_reference, within_the_basis);
  check_against_reference("skinny step noise", scenario_of(MatmulPrecision::kHighest), step_plan,
                          step_reference, noise);
  Scenario nesterov = scenario_of(MatmulPrecision::kHighest);
  nesterov.options.nesterov = true;
  nesterov.options.orthogonalize = 1;  // of the others alone
  check_against_reference("skinny step nesterov", nesterov, step_plan, step_reference);
  check_against_reference("skinny step nesterov noise", nesterov, step_plan, step_reference, noise);
  Scenario zero = scenario_of(MatmulPrecision::kHighest);
  check_against_reference("skinny step zero gradients", zero, step_plan, step_reference,
                          zero_gradients);
  std::erase_if(zero.specs, [](const CaseSpec& spec) { return spec.skinny_rank == 0; });
  check_against_reference("skinny step zero rho", zero, step_plan, without_averages, zero_rho);
}

}  // namespace kernel_check
