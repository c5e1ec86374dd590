#include "aten/ops.h"

#include <ATen/Context.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <limits>
#include <map>

#include "aten/batch_ops.h"
#include "aten/refresh_basis.h"
#include "aten/skinny.h"

namespace dykaf::aten {
namespace {

std::vector<const Matrix*> pointers(const Matrices& matrices) {
  std::vector<const Matrix*> result;
  for (const Matrix& w : matrices) result.push_back(&w);
  return result;
}

// For operations that take all matrices of a likeness.
int64_t together(const Matrix&) { return 0; }

std::optional<c10::Device> device_of(const Matrices& matrices) {
  if (matrices.empty()) return std::nullopt;
  return matrices[0].step.device();
}

// body(batch) for all matrices, and a commit after each.
template <typename Body>
void commit_each(const Matrices& matrices, const Inputs& inputs, const Body& body) {
  const c10::OptionalDeviceGuard guard(device_of(matrices));
  for_each_batch(pointers(matrices), together, [&](Batch batch) {
    body(batch);
    batch.commit(inputs.skip);
  });
}

std::vector<size_t> places_of(const Matrices& matrices, const std::vector<const Matrix*>& chosen) {
  std::vector<size_t> places;
  for (const Matrix* w : chosen) places.push_back(static_cast<size_t>(w - matrices.data()));
  return places;
}

// Those at `places`, in `room` if they are not all.
const Matrices& some_of(const Matrices& all, const std::vector<size_t>& places, Matrices& room) {
  if (places.size() == all.size()) return all;
  room = chosen(all, places);
  return room;
}

at::Tensor nan_for_infinite(const at::Tensor& x) {
  return at::where(at::isfinite(x), x, at::full_like(x, std::numeric_limits<double>::quiet_NaN()));
}

}  // namespace

at::Tensor grad_max(const std::vector<at::Tensor>& gradients, at::ScalarType dtype) {
  if (gradients.empty()) return at::empty({0}, at::TensorOptions().dtype(dtype));
  const c10::DeviceGuard guard(gradients[0].device());
  std::map<at::ScalarType, std::vector<size_t>> by_dtype;
  std::vector<at::Tensor> maxima(gradients.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (gradients[i].numel() == 0) {
      maxima[i] = at::zeros({}, gradients[i].options().dtype(dtype));
    } else {
      by_dtype[gradients[i].scalar_type()].push_back(i);
    }
  }
  for (const auto& [key, places] : by_dtype) {
    std::vector<at::Tensor> list;
    for (size_t i : places) list.push_back(gradients[i]);
    const auto norms = at::_foreach_norm(list, std::numeric_limits<double>::infinity());
    const at::Tensor stacked = at::stack(norms).to(dtype);
    if (places.size() == maxima.size()) return nan_for_infinite(stacked);
    for (size_t k = 0; k < places.size(); ++k) {
      maxima[places[k]] = stacked[static_cast<int64_t>(k)];
    }
  }
  return nan_for_infinite(at::stack(maxima));
}

void rotate(const Matrices& matrices, const Inputs& inputs, Rotation rotation) {
  commit_each(matrices, inputs, [&](Batch& batch) {
    batch.set(&Matrix::update,
              rotated(batch, batch.get(&Matrix::grad), rotation, inputs.options.precision));
  });
}

void adam_update_(const Matrices& matrices, const Inputs& inputs) {
  commit_each(matrices, inputs, [&](Batch& batch) {
    batch.set(&Matrix::update, adam_update_(batch, inputs, scaled_gradients(batch, inputs)));
  });
}

void orthogonalize_(const Matrices& matrices, const Inputs& inputs) {
  commit_each(matrices, inputs, [&](Batch& batch) {
    batch.set(&Matrix::update, orthogonalized_(batch, inputs.options, batch.get(&Matrix::update)));
  });
}

void apply_update_(const Matrices& matrices, const Inputs& inputs) {
  commit_each(matrices, inputs,
              [&](Batch& batch) { apply_update_(batch, inputs, batch.get(&Matrix::update)); });
}

void factor_update_(const Matrices& matrices, const Inputs& inputs) {
  commit_each(matrices, inputs, [&](Batch& batch) {
    factor_update_(batch, inputs, scaled_gradients(batch, inputs));
  });
}

std::vector<size_t> refresh_basis_(const Matrices& matrices, const Inputs& inputs, Side side) {
  const c10::OptionalDeviceGuard guard(device_of(matrices));
  // Rounding would turn the bases away from orthogonality for good; where it gets by this guard the
  // judgement of the decompositions sees it.
  const at::NoTF32Guard full_precision;
  std::vector<const Matrix*> chosen;
  for (const Matrix& w : matrices) {
    if (w.has_factor(side)) chosen.push_back(&w);
  }
  std::vector<const Matrix*> failed;
  for_each_batch(chosen, together, [&](Batch batch) {
    try {
      if (batch.first().is_long(side)) {
        refresh_long_(batch, inputs.options);
      } else {
        refresh_basis_(batch, inputs, side, cholesky_orthonormalize);
      }
    } catch (const std::exception&) {
      // Without memory, say: a step can do without a refresh.
      for (const Matrix* w : batch.matrices()) {
        w->refresh_fallbacks.add_(1);
        w->refreshes[static_cast<size_t>(side)] += 1;
        if (w->is_full()) forget_gradients_(*w);
        failed.push_back(w);
      }
    }
  });
  return places_of(matrices, failed);
}

std::vector<size_t> refresh_due_(const Matrices& matrices, const Inputs& inputs) {
  const auto due = take_due(std::span<const Matrix>(matrices), inputs.options);
  std::vector<size_t> failed;
  for (const Side side : {Side::kLeft, Side::kRight}) {
    const std::vector<size_t>& places = due[static_cast<size_t>(side)];
    const Matrices list = chosen(matrices, places);
    for (const size_t i : refresh_basis_(list, inputs, side)) failed.push_back(places[i]);
  }
  return failed;
}

Step::Step(Matrices matrices, const Inputs& inputs, Refreshes refreshes)
    : matrices_(std::move(matrices)), inputs_(inputs), refreshes_(refreshes), places_(matrices_) {}

namespace {

// The update in the basis, and the factors' step.
at::Tensor in_basis_(Batch& batch, const Inputs& inputs, const ScaledGradients& gradients) {
  if (inputs.options.is_whitened()) return whitened_update_(batch, inputs, gradients);
  at::Tensor update = adam_update_(batch, inputs, gradients);
  if (inputs.options.orthogonalize > 0) update = orthogonalized_(batch, inputs.options, update);
  if (!batch.first().is_unsided()) factor_update_(batch, inputs, gradients);
  return update;
}

}  // namespace

void step_(Batch& batch, const Inputs& inputs) {
  const MatmulPrecision precision = inputs.options.precision;
  ScaledGradients gradients = scaled_gradients(batch, inputs);
  at::Tensor update;
  if (batch.first().is_adamw()) {
    update = adam_update_(batch, inputs, gradients);
  } else if (batch.first().is_skinny()) {
    update = skinny_step_(batch, inputs, gradients);
  } else {
    gradients.H = rotated(batch, gradients.H, Rotation::kIntoBasis, precision);
    update = in_basis_(batch, inputs, gradients);
    update = rotated(batch, update, Rotation::kOutOfBasis, precision);
  }
  apply_update_(batch, inputs, update);
  batch.commit(inputs.skip);
  if (batch.first().is_skinny()) count_rows_(batch);
}

void Step::initialize_() { aten::initialize_(chosen(matrices_, places_.fresh), inputs_); }

void Step::reset_() {
  for (size_t i : places_.fresh) aten::reset_(matrices_[i]);
}

StepReport Step::run_() {
  StepReport report;
  report.waiting = places_.still_waiting(matrices_);
  Matrices room;
  const Matrices& running = some_of(matrices_, places_.running, room);
  const c10::OptionalDeviceGuard guard(device_of(running));
  std::vector<const Matrix*> failed;
  for_each_batch(pointers(running), together, [&](Batch batch) {
    try {
      step_(batch, inputs_);
    } catch (const std::exception&) {
      failed.insert(failed.end(), batch.matrices().begin(), batch.matrices().end());
    }
  });
  for (size_t i : places_of(running, failed)) report.failed.push_back(places_.running[i]);
  if (refreshes_ == Refreshes::kApart) return report;

  std::vector<size_t> done;
  for (size_t i : places_.running) {
    if (std::find(report.failed.begin(), report.failed.end(), i) == report.failed.end()) {
      done.push_back(i);
    }
  }
  Matrices done_room;
  for (size_t i : refresh_due_(some_of(matrices_, done, done_room), inputs_)) {
    report.stayed.push_back(done[i]);
  }
  return report;
}

}  // namespace dykaf::aten
