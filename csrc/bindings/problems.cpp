#include "bindings/problems.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <sstream>

#include "aten/ops.h"
#include "bindings/on_cuda.h"
#include "bindings/state_reader.h"
#include "dykaf/ops.h"
#include "dykaf/schedule.h"

namespace dykaf::bindings {
namespace {

DType dtype_of(const std::string& name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      fail(name, "float64, float32, bfloat16 or float16", describe(tensor));
  }
}

void check_dense(const std::string& name, const at::Tensor& tensor, const at::Device& device) {
  if (tensor.layout() != at::kStrided || tensor.device() != device) {
    fail(name, "a dense tensor on " + (device.is_cpu() ? "the CPU" : device.str()),
         tensor.layout() != at::kStrided ? "layout " + std::string("sparse") : describe(tensor));
  }
}

// Of a stack, null where there is none; grad_max of all matrices.
struct MatrixInputs {
  const at::Tensor* grad = nullptr;
  const at::Tensor* param = nullptr;
  const at::Tensor* update = nullptr;
  const at::Tensor* grad_max = nullptr;
};

// Those of matrix i of the stack, which is number `place` of all; `dtype` is its gradient's.
template <typename T>
void set_inputs(Problem<T>& p, const MatrixInputs& inputs, int64_t i, size_t place, DType dtype) {
  p.dtype = dtype;
  const auto offset = [&](const at::Tensor& tensor) {
    return i * p.size() * static_cast<int64_t>(tensor.element_size());
  };
  if (inputs.grad != nullptr) {
    p.grad = static_cast<const char*>(inputs.grad->const_data_ptr()) + offset(*inputs.grad);
  }
  if (inputs.param != nullptr) {
    p.param = static_cast<char*>(inputs.param->mutable_data_ptr()) + offset(*inputs.param);
  }
  if (inputs.grad_max != nullptr && inputs.grad_max->is_cpu()) {
    p.grad_max = inputs.grad_max->const_data_ptr<double>()[place];
  }
}

void set_inputs(aten::Matrix& w, const MatrixInputs& inputs, int64_t i, size_t place, DType) {
  const auto matrix = [&](at::Tensor tensor) {
    take(tensor, i, {w.m, w.n});
    return tensor;
  };
  if (inputs.grad != nullptr) w.grad = matrix(*inputs.grad);
  if (inputs.param != nullptr) w.param = matrix(*inputs.param);
  if (inputs.update != nullptr) w.update = matrix(*inputs.update);
  if (inputs.grad_max != nullptr) {
    w.grad_max = inputs.grad_max->select(0, static_cast<int64_t>(place));
  }
}

template <typename List>
void check_length(const char* name, const std::optional<List>& list, size_t expected) {
  if (list && list->size() != expected) {
    fail(name, std::to_string(expected) + " entries", std::to_string(list->size()));
  }
}

}  // namespace

std::string describe(const at::Tensor& tensor) {
  std::ostringstream out;
  out << tensor.scalar_type() << " " << tensor.sizes() << " on " << tensor.device();
  if (!tensor.is_contiguous()) out << ", not contiguous";
  return out.str();
}

void fail(const std::string& name, const std::string& expected, const std::string& got) {
  throw py::value_error(name + ": expected " + expected + ", got " + got);
}

at::Device device_of(const std::vector<py::dict>& states) {
  if (states.empty()) return at::kCPU;
  return StateReader(0, states[0], at::kCPU).tensor("step").device();
}

std::vector<int64_t> count_matrices(const std::vector<py::dict>& states) {
  std::vector<int64_t> counts;
  for (size_t i = 0; i < states.size(); ++i) {
    counts.push_back(StateReader(i, states[i], at::kCPU).tensor("step").numel());
  }
  return counts;
}

namespace {

// Of maxima; MPS has no float64.
at::ScalarType grad_max_dtype(const at::Device& device) {
  return device.is_mps() ? at::kFloat : at::kDouble;
}

// Each gradient's parts, as the native backends and as aten take them.
std::vector<Gradient> gradients_of(const TensorList& grads, const std::vector<int64_t>& counts) {
  std::vector<Gradient> parts;
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t size = grads[i].numel() / counts[i];
    const auto* data = static_cast<const char*>(grads[i].const_data_ptr());
    const int64_t element_size = static_cast<int64_t>(grads[i].element_size());
    for (int64_t j = 0; j < counts[i]; ++j) {
      parts.push_back({data + j * size * element_size, size, dtype_of("grads", grads[i])});
    }
  }
  return parts;
}

at::Tensor largest_of(const std::vector<Gradient>& parts, [[maybe_unused]] const at::Device& device,
                      [[maybe_unused]] Backend backend) {
#if defined(DYKAF_WITH_CUDA)
  if (backend == Backend::kCuda) return grad_max_on_cuda(parts, device);
#endif
  at::Tensor maxima = at::empty({static_cast<int64_t>(parts.size())}, at::kDouble);
  cpu::grad_max(parts, maxima.mutable_data_ptr<double>());
  return maxima;
}

TensorList views_of(const TensorList& grads, const std::vector<int64_t>& counts) {
  TensorList parts;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (counts[i] == 1) {
      parts.push_back(grads[i]);
      continue;
    }
    const at::Tensor rows = grads[i].view({counts[i], grads[i].numel() / counts[i]});
    for (const at::Tensor& row : rows.unbind(0)) parts.push_back(row);
  }
  return parts;
}

}  // namespace

at::Tensor grad_max(const TensorList& grads, const std::vector<int64_t>& counts) {
  if (grads.size() != counts.size()) {
    fail("counts", "one entry per gradient (" + std::to_string(grads.size()) + ")",
         std::to_string(counts.size()));
  }
  const at::Device device = grads.empty() ? at::Device(at::kCPU) : grads[0].device();
  Backend backend = Backend::kCpu;
  for (size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor& grad = grads[i];
    const std::string name = "grads[" + std::to_string(i) + "]";
    check_dense(name, grad, device);
    dtype_of(name, grad);
    if (!grad.is_contiguous()) fail(name, "a contiguous tensor", describe(grad));
    if (counts[i] < 1 || grad.numel() % counts[i] != 0) {
      fail("counts[" + std::to_string(i) + "]",
           "a positive divisor of " + std::to_string(grad.numel()), std::to_string(counts[i]));
    }
    // One that native kernels do not serve takes the others along.
    if (backend != Backend::kAten) backend = backend_of(name, grad);
  }
  const Apart apart;
  if (backend == Backend::kAten) {
    return aten::grad_max(views_of(grads, counts), grad_max_dtype(device));
  }
  return largest_of(gradients_of(grads, counts), device, backend);
}

at::Tensor entries(const at::Tensor& vector, const std::vector<size_t>& places) {
  const auto num = static_cast<int64_t>(places.size());
  const int64_t first = places.empty() ? 0 : static_cast<int64_t>(places.front());
  if (places.empty() || static_cast<int64_t>(places.back()) - first == num - 1) {
    return vector.narrow(0, first, num);
  }
  const std::vector<int64_t> indices(places.begin(), places.end());
  return vector.index_select(0, at::tensor(indices).to(vector.device(), /*non_blocking=*/true));
}

std::optional<at::Tensor> Problems::maxima_of(const std::vector<size_t>& places) const {
  if (!grad_max_) return std::nullopt;
  return entries(*grad_max_, places);
}

const at::Tensor& Problems::contiguous_param(const at::Tensor& param) {
  if (param.is_contiguous()) return param;
  copies_.emplace_back(param.contiguous(), param);
  return copies_.back().first;
}

void Problems::write_back() {
  for (auto& [copy, original] : copies_) original.copy_(copy);
  for (const at::Tensor& param : params_) {
    if (!param.is_inference()) param.unsafeGetTensorImpl()->bump_version();
  }
}

bool Problems::keep() {
  const bool has_addresses = device_.is_cpu() || device_.is_cuda();
  const bool is_enough = copies_.empty() && (aten.matrices.empty() || has_addresses);
  for (aten::Matrix& w : aten.matrices) {
    w.let_go_of_inputs();
    if (is_enough && !is_kept_) w.disown_state();
  }
  is_kept_ = is_enough;
  params_.clear();
  copies_.clear();
  grad_max_.reset();
  return is_enough;
}

template <typename Matrix>
void Problems::renew(MatrixList<Matrix>& list, const TensorList& grads,
                     const std::vector<Rate>& rates) {
  for (size_t k = 0; k < list.matrices.size(); ++k) {
    Matrix& p = list.matrices[k];
    const size_t source = list.sources[k];
    const MatrixInputs given{
        .grad = &grads[source], .param = &params_[source], .grad_max = &*grad_max_};
    set_inputs(p, given, list.members[k], list.places[k], dtype_of("grads", grads[source]));
    p.rate = rates[source];
  }
}

void Problems::renew(const TensorList& params, const TensorList& grads, const at::Tensor& grad_max,
                     const std::vector<Rate>& rates) {
  const Apart apart;
  params_ = params;
  grad_max_ = grad_max;
  renew(single, grads, rates);
  renew(wide, grads, rates);
  renew(cuda, grads, rates);
  renew(aten, grads, rates);
}

at::Tensor Problems::grad_max_of(const TensorList& grads) const {
  std::vector<int64_t> counts(grads.size(), 0);
  const auto count = [&](const auto& list) {
    for (size_t source : list.sources) counts[source] += 1;
  };
  count(single);
  count(wide);
  count(cuda);
  count(aten);
  if (!aten.matrices.empty())
    return aten::grad_max(views_of(grads, counts), grad_max_dtype(device_));
  const Backend backend = cuda.matrices.empty() ? Backend::kCpu : Backend::kCuda;
  return largest_of(gradients_of(grads, counts), device_, backend);
}

bool Problems::needs_a_look() const {
  const auto any_of = [](const auto& list, const auto& condition) {
    return std::any_of(list.matrices.begin(), list.matrices.end(), condition);
  };
  const auto is_unfit = [](const auto& p) {
    return p.is_skinny() && !rows_fit(p, p.rows[0], p.rows[1]);
  };
  const auto is_fresh = [](const auto& p) { return awaits_first_gradient(p); };
  return any_of(single, is_unfit) || any_of(wide, is_unfit) || any_of(cuda, is_unfit) ||
         any_of(aten, is_unfit) || any_of(cuda, is_fresh) || any_of(aten, is_fresh);
}

namespace {

// One in the state's dtype.
at::Tensor own_tensor(const StateReader& state, size_t index, const Inputs& inputs) {
  return inputs.needs_moments ? state.tensor("exp_avg") : (*inputs.updates)[index];
}

}  // namespace

template <typename Matrix>
void Problems::append(MatrixList<Matrix>& list, size_t index, const py::dict& state_dict,
                      const Inputs& inputs, const Options& options) {
  const StateReader state(index, state_dict, device_);
  const bool is_matrix = state.has("rho");
  const bool needs_matrix = inputs.needs_matrices || inputs.needs_factors;
  if (needs_matrix && !is_matrix) fail(state.name("rho"), "a tensor", "nothing");
  if (inputs.needs_dense && state.has("basis")) {
    fail(state.name("basis"), "nothing: this operation takes no skinny matrix", "a tensor");
  }
  if (inputs.needs_factors && !state.has("L") && !state.has("R")) {
    fail(state.name("L"), "a tensor here or at 'R'", "nothing");
  }
  const at::Tensor step = state.tensor("step");
  const std::vector<int64_t> batch = step.sizes().vec();
  const int64_t count = step.numel();
  Matrix p{};
  if (!inputs.needs_moments) {
    p.m = 1;
    p.n = (*inputs.updates)[index].numel() / std::max<int64_t>(count, 1);
  } else {
    p = is_matrix ? read_matrix<Matrix>(state, options.second_moment, batch)
                  : read_adamw<Matrix>(state);
    state.read(p.update_rms, "update_rms", batch, at::kFloat);
  }
  state.read(p.step, "step", batch, at::kFloat);
  const int64_t numel = count * p.size();
  if (inputs.needs_moments && !is_matrix && count != 1) {
    fail(state.name("step"), "one entry", std::to_string(count));
  }

  const auto check_input = [&](const std::string& name, const at::Tensor& tensor) {
    check_dense(name, tensor, device_);
    if (tensor.numel() != numel) {
      fail(name, std::to_string(numel) + " elements, as the state has", describe(tensor));
    }
    return dtype_of(name, tensor);
  };
  const auto check_contiguous = [&](const std::string& name, const at::Tensor& tensor,
                                    DType expected) {
    if (check_input(name, tensor) != expected) {
      fail(name,
           inputs.params && name.starts_with("grads") ? "the parameter's dtype"
                                                      : "the state's dtype",
           describe(tensor));
    }
    if (!tensor.is_contiguous()) fail(name, "a contiguous tensor", describe(tensor));
  };
  const auto indexed = [&](const char* name) {
    return std::string(name) + "[" + std::to_string(index) + "]";
  };

  const bool is_wide = own_tensor(state, index, inputs).scalar_type() == at::kDouble;
  const DType own = is_wide ? DType::kFloat64 : DType::kFloat32;
  DType dtype = own;
  MatrixInputs given;
  if (inputs.params) {
    const at::Tensor& param = (*inputs.params)[index];
    dtype = check_input(indexed("params"), param);
    if ((dtype == DType::kFloat64) != is_wide) {
      fail(indexed("params"), is_wide ? "float64, as the state has" : "a dtype of 32 or 16 bits",
           describe(param));
    }
    state.read_optional(p.master, "master", param.sizes(), is_wide ? at::kDouble : at::kFloat);
    given.param = &contiguous_param(param);
    params_.push_back(param);
  }
  if (inputs.grads) {
    given.grad = &(*inputs.grads)[index];
    check_contiguous(indexed(inputs.grads_name), *given.grad, dtype);
  }
  if (inputs.updates) {
    given.update = &(*inputs.updates)[index];
    check_contiguous(indexed("updates"), *given.update, own);
  }
  if (inputs.grad_max) given.grad_max = &*inputs.grad_max;
  if (inputs.streams) p.stream = (*inputs.streams)[index];
  if (!inputs.rates.empty()) p.rate = inputs.rates[index];
  if (!inputs.places.empty()) {
    const auto [first, run, stride] = inputs.places[index];
    p.place = {first, run, stride};
  }
  if (inputs.offsets) {
    const auto& offsets = (*inputs.offsets)[index];
    if (offsets.size() != 2) fail("offsets", "two entries", std::to_string(offsets.size()));
    std::copy_n(offsets.begin(), 2, p.refresh_offset);
  }

  for (int64_t i = 0; i < count; ++i) {
    list.matrices.push_back(matrix_of_stack(p, i));
    set_inputs(list.matrices.back(), given, i, num_matrices_, dtype);
    list.sources.push_back(index);
    list.members.push_back(i);
    list.places.push_back(num_matrices_++);
  }
}

Problems::Problems(const std::vector<py::dict>& states, const Inputs& inputs,
                   const Options& options)
    : device_(device_of(states)), grad_max_(inputs.grad_max) {
  const Apart apart;
  check_length("params", inputs.params, states.size());
  check_length(inputs.grads_name, inputs.grads, states.size());
  check_length("updates", inputs.updates, states.size());
  check_length("streams", inputs.streams, states.size());
  if (!inputs.places.empty()) {
    check_length("places", std::optional(inputs.places), states.size());
  }
  check_length("offsets", inputs.offsets, states.size());
  if (inputs.grad_max) {
    const std::vector<int64_t> counts = count_matrices(states);
    const auto num = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    const at::Tensor& maxima = *inputs.grad_max;
    const bool is_known =
        maxima.scalar_type() == at::kDouble ||
        (maxima.scalar_type() == at::kFloat && backend_of("grad_max", maxima) == Backend::kAten);
    if (maxima.numel() != num || !is_known || maxima.device() != device_ ||
        !maxima.is_contiguous()) {
      fail("grad_max",
           "float64 on " + device_.str() + ", one entry per matrix (" + std::to_string(num) + ")",
           describe(maxima));
    }
  }
  for (size_t i = 0; i < states.size(); ++i) {
    const StateReader state(i, states[i], device_);
    const at::Tensor own = own_tensor(state, i, inputs);
    const std::string name =
        inputs.needs_moments ? state.name("exp_avg") : "updates[" + std::to_string(i) + "]";
    Backend backend = backend_of(name, own);
    // The kernels have Adam's updates alone.
    const bool is_whitened = options.is_whitened() && state.has("rho");
    if (backend == Backend::kCuda && is_whitened) backend = Backend::kAten;
    switch (backend) {
      case Backend::kCpu:
        if (own.scalar_type() == at::kDouble) {
          append(wide, i, states[i], inputs, options);
        } else {
          append(single, i, states[i], inputs, options);
        }
        break;
      case Backend::kCuda:
        append(cuda, i, states[i], inputs, options);
        break;
      case Backend::kAten:
        append(aten, i, states[i], inputs, options);
        break;
    }
  }
}

}  // namespace dykaf::bindings
