#include "bindings/problems.h"

#include <ATen/ops/empty.h>

#include <numeric>
#include <sstream>

#include "bindings/device_ops.h"
#include "dykaf/ops.h"

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

// One parameter's state, read by name.
class StateReader {
 public:
  StateReader(size_t index, const py::dict& state, const at::Device& device)
      : prefix_("states[" + std::to_string(index) + "]"), state_(state), device_(device) {}

  bool has(const char* key) const { return state_.contains(key); }

  at::Tensor tensor(const char* key) const {
    if (!has(key)) fail(name(key), "a tensor", "nothing");
    try {
      return py::cast<at::Tensor>(state_[key]);
    } catch (const py::cast_error&) {
      fail(name(key), "a tensor", py::cast<std::string>(py::repr(state_[key])));
    }
  }

  template <typename T>
  T* pointer(const char* key, at::IntArrayRef shape) const {
    return checked<T>(key, shape, device_);
  }

  // For what the host reads and writes on any backend.
  template <typename T>
  T* host_pointer(const char* key, at::IntArrayRef shape) const {
    return checked<T>(key, shape, at::Device(at::kCPU));
  }

  template <typename T>
  T* optional(const char* key, at::IntArrayRef shape) const {
    return has(key) ? pointer<T>(key, shape) : nullptr;
  }

  std::string name(const char* key) const { return prefix_ + "['" + key + "']"; }

 private:
  template <typename T>
  T* checked(const char* key, at::IntArrayRef shape, const at::Device& device) const {
    const at::Tensor value = tensor(key);
    const auto dtype = c10::CppTypeToScalarType<T>::value;
    if (value.scalar_type() != dtype || value.sizes() != shape || !value.is_contiguous() ||
        value.device() != device) {
      std::ostringstream expected;
      expected << "contiguous " << dtype << " " << shape << " on " << device;
      fail(name(key), expected.str(), describe(value));
    }
    return value.mutable_data_ptr<T>();
  }

  std::string prefix_;
  const py::dict& state_;
  at::Device device_;
};

std::vector<int64_t> extend(at::IntArrayRef batch, std::initializer_list<int64_t> tail) {
  std::vector<int64_t> shape(batch.begin(), batch.end());
  shape.insert(shape.end(), tail);
  return shape;
}

template <typename T>
T* advance(T* pointer, int64_t count) {
  return pointer == nullptr ? nullptr : pointer + count;
}

// What the state of a skinny matrix has of its own.
template <typename T>
void read_skinny(const StateReader& state, at::IntArrayRef batch, Problem<T>& p) {
  const at::Tensor basis = state.tensor("basis");
  const int64_t num_rows = basis.dim() >= 2 ? basis.size(-2) : 0;
  p.skinny_rank = num_rows / 2;
  if (p.skinny_rank < p.short_side() || num_rows > p.long_side()) {
    fail(state.name("basis"),
         "rows twice as many as the short side's length at least, and at most "
         "as many as columns",
         describe(basis));
  }
  p.basis = state.pointer<T>("basis", extend(batch, {2 * p.skinny_rank, p.long_side()}));
  p.core = state.pointer<T>("core", extend(batch, {2 * p.skinny_rank, 2 * p.skinny_rank}));
  p.flat = state.pointer<T>("flat", batch);
  p.rows = state.host_pointer<int64_t>("rows", extend(batch, {2}));
  const at::Tensor rows = state.tensor("rows");
  for (int64_t i = 0; i < rows.numel(); i += 2) {
    const int64_t inner = p.rows[i];
    const int64_t used = p.rows[i + 1];
    if (inner < 0 || inner > p.skinny_rank || used < inner ||
        used > 2 * p.skinny_rank - p.short_side()) {
      fail(state.name("rows"),
           "counts of rows with room for another gradient in " + std::to_string(num_rows),
           std::to_string(inner) + " and " + std::to_string(used));
    }
  }
  p.exp_avg_sq = state.pointer<T>("exp_avg_sq", extend(batch, {p.short_side(), p.skinny_rank + 1}));
}

// The state of matrix 0 of a parameter with factors; shapes: batch + the tails below.
template <typename T>
Problem<T> read_factored(const StateReader& state, SecondMoment second_moment,
                         at::IntArrayRef batch) {
  const at::Tensor exp_avg = state.tensor("exp_avg");
  Problem<T> p{};
  p.m = exp_avg.dim() >= 2 ? exp_avg.size(-2) : 1;
  p.n = exp_avg.dim() >= 2 ? exp_avg.size(-1) : exp_avg.numel();
  p.exp_avg = state.pointer<T>("exp_avg", extend(batch, {p.m, p.n}));
  if (state.has("basis")) {
    read_skinny(state, batch, p);
  } else if (second_moment == SecondMoment::kFull) {
    p.exp_avg_sq = state.pointer<T>("exp_avg_sq", extend(batch, {p.m, p.n}));
  } else {
    p.exp_avg_sq_row = state.pointer<T>("exp_avg_sq_row", extend(batch, {p.m}));
    p.exp_avg_sq_col = state.pointer<T>("exp_avg_sq_col", extend(batch, {p.n}));
    if (second_moment == SecondMoment::kRankOne) {
      p.exp_avg_sq_scale = state.pointer<double>("exp_avg_sq_scale", batch);
    }
  }
  p.L = state.optional<T>("L", extend(batch, {p.m, p.m}));
  p.R = state.optional<T>("R", extend(batch, {p.n, p.n}));
  if (p.L != nullptr) p.Q_L = state.pointer<T>("Q_L", extend(batch, {p.m, p.m}));
  if (p.R != nullptr) p.Q_R = state.pointer<T>("Q_R", extend(batch, {p.n, p.n}));
  if (p.is_unsided()) fail(state.name("L"), "a factor on one side at least", "neither L nor R");
  p.rho = state.pointer<double>("rho", extend(batch, {2}));
  p.next_refresh = state.host_pointer<int64_t>("next_refresh", extend(batch, {2}));
  p.refreshes = state.host_pointer<int64_t>("refreshes", extend(batch, {2}));
  p.schedule_step = state.host_pointer<int64_t>("schedule_step", batch);
  p.refresh_fallbacks = state.pointer<int64_t>("refresh_fallbacks", batch);
  return p;
}

// The state of a parameter without factors, seen as 1 x numel.
template <typename T>
Problem<T> read_unsided(const StateReader& state) {
  const at::Tensor exp_avg = state.tensor("exp_avg");
  Problem<T> p{};
  p.m = 1;
  p.n = exp_avg.numel();
  p.exp_avg = state.pointer<T>("exp_avg", exp_avg.sizes());
  p.exp_avg_sq = state.pointer<T>("exp_avg_sq", exp_avg.sizes());
  return p;
}

// Matrix `i` of a stack.
template <typename T>
Problem<T> matrix_of_stack(Problem<T> p, int64_t i, size_t element_size) {
  const int64_t start = i * p.size();
  if (p.grad != nullptr) p.grad = static_cast<const char*>(p.grad) + start * element_size;
  if (p.param != nullptr) p.param = static_cast<char*>(p.param) + start * element_size;
  p.master = advance(p.master, start);
  p.exp_avg = advance(p.exp_avg, start);
  const int64_t skinny_moments = p.short_side() * (p.skinny_rank + 1);
  p.exp_avg_sq = advance(p.exp_avg_sq, p.is_skinny() ? i * skinny_moments : start);
  p.exp_avg_sq_row = advance(p.exp_avg_sq_row, i * p.m);
  p.exp_avg_sq_col = advance(p.exp_avg_sq_col, i * p.n);
  p.exp_avg_sq_scale = advance(p.exp_avg_sq_scale, i);
  p.L = advance(p.L, i * p.m * p.m);
  p.Q_L = advance(p.Q_L, i * p.m * p.m);
  p.R = advance(p.R, i * p.n * p.n);
  p.Q_R = advance(p.Q_R, i * p.n * p.n);
  p.basis = advance(p.basis, i * 2 * p.skinny_rank * p.long_side());
  p.core = advance(p.core, i * 4 * p.skinny_rank * p.skinny_rank);
  p.flat = advance(p.flat, i);
  p.rows = advance(p.rows, 2 * i);
  p.rho = advance(p.rho, 2 * i);
  p.step = advance(p.step, i);
  p.next_refresh = advance(p.next_refresh, 2 * i);
  p.refreshes = advance(p.refreshes, 2 * i);
  p.schedule_step = advance(p.schedule_step, i);
  p.refresh_fallbacks = advance(p.refresh_fallbacks, i);
  p.update_rms = advance(p.update_rms, i);
  for (int64_t& offset : p.refresh_offset) offset += i;
  p.update_offset += i;
  p.stream = (p.stream << 32) + static_cast<uint64_t>(i);
  return p;
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

Backend backend_of(const std::vector<py::dict>& states) {
  if (states.empty()) return Backend::kCpu;
  return backend_of("states[0]['exp_avg']", StateReader(0, states[0], at::kCPU).tensor("exp_avg"));
}

std::vector<int64_t> count_matrices(const std::vector<py::dict>& states) {
  std::vector<int64_t> counts;
  for (size_t i = 0; i < states.size(); ++i) {
    counts.push_back(StateReader(i, states[i], at::kCPU).tensor("step").numel());
  }
  return counts;
}

at::Tensor grad_max(const TensorList& grads, const std::vector<int64_t>& counts) {
  if (grads.size() != counts.size()) {
    fail("counts", "one entry per gradient (" + std::to_string(grads.size()) + ")",
         std::to_string(counts.size()));
  }
  const at::Device device = grads.empty() ? at::Device(at::kCPU) : grads[0].device();
  [[maybe_unused]] const Backend backend =
      grads.empty() ? Backend::kCpu : backend_of("grads[0]", grads[0]);
  std::vector<Gradient> parts;
  for (size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor& grad = grads[i];
    const std::string name = "grads[" + std::to_string(i) + "]";
    check_dense(name, grad, device);
    const DType dtype = dtype_of(name, grad);
    if (!grad.is_contiguous()) fail(name, "a contiguous tensor", describe(grad));
    if (counts[i] < 1 || grad.numel() % counts[i] != 0) {
      fail("counts[" + std::to_string(i) + "]",
           "a positive divisor of " + std::to_string(grad.numel()), std::to_string(counts[i]));
    }
    const int64_t size = grad.numel() / counts[i];
    const auto* data = static_cast<const char*>(grad.const_data_ptr());
    for (int64_t j = 0; j < counts[i]; ++j) {
      parts.push_back({data + j * size * grad.element_size(), size, dtype});
    }
  }
#if defined(DYKAF_WITH_CUDA)
  if (backend == Backend::kCuda) {
    for (size_t i = 0; i < grads.size(); ++i) {
      if (grads[i].scalar_type() == at::kDouble) {
        fail("grads[" + std::to_string(i) + "]", "float32, bfloat16 or float16 on a GPU",
             describe(grads[i]));
      }
    }
    return grad_max_on_device(parts, device);
  }
#endif
  at::Tensor maxima = at::empty({static_cast<int64_t>(parts.size())}, at::kDouble);
  cpu::grad_max(parts, maxima.mutable_data_ptr<double>());
  return maxima;
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

template <typename T>
void Problems::append(ProblemList<T>& list, size_t index, const py::dict& state_dict,
                      const Inputs& inputs, SecondMoment second_moment) {
  const StateReader state(index, state_dict, device_);
  const bool factored = state.has("rho");
  if (inputs.needs_factors && !factored) fail(state.name("rho"), "a tensor", "nothing");
  if (inputs.needs_dense && state.has("basis")) {
    fail(state.name("basis"), "nothing: this operation takes no skinny matrix", "a tensor");
  }
  const at::Tensor step = state.tensor("step");
  const std::vector<int64_t> batch = step.sizes().vec();
  Problem<T> p = factored ? read_factored<T>(state, second_moment, batch) : read_unsided<T>(state);
  p.step = state.pointer<float>("step", batch);
  p.update_rms = state.pointer<float>("update_rms", batch);
  const int64_t count = step.numel();
  const int64_t numel = count * p.size();
  if (!factored && count != 1) fail(state.name("step"), "one entry", std::to_string(count));

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

  constexpr bool kWide = std::is_same_v<T, double>;
  p.dtype = kWide ? DType::kFloat64 : DType::kFloat32;
  size_t element_size = sizeof(T);
  if (inputs.params) {
    const at::Tensor& param = (*inputs.params)[index];
    p.dtype = check_input(indexed("params"), param);
    if ((p.dtype == DType::kFloat64) != kWide) {
      fail(indexed("params"), kWide ? "float64, as the state has" : "a dtype of 32 or 16 bits",
           describe(param));
    }
    p.master = state.optional<T>("master", param.sizes());
    p.param = contiguous_param(param).mutable_data_ptr();
    params_.push_back(param);
    element_size = param.element_size();
  }
  if (inputs.grads) {
    const at::Tensor& grad = (*inputs.grads)[index];
    check_contiguous(indexed(inputs.grads_name), grad, p.dtype);
    p.grad = grad.const_data_ptr();
  }
  if (inputs.updates) {
    check_contiguous(indexed("updates"), (*inputs.updates)[index],
                     kWide ? DType::kFloat64 : DType::kFloat32);
  }
  if (inputs.streams) p.stream = (*inputs.streams)[index];
  if (inputs.offsets) {
    const auto& offsets = (*inputs.offsets)[index];
    if (offsets.size() != 3) fail("offsets", "three entries", std::to_string(offsets.size()));
    std::copy_n(offsets.begin(), 2, p.refresh_offset);
    p.update_offset = offsets[2];
  }

  for (int64_t i = 0; i < count; ++i) {
    Problem<T> matrix = matrix_of_stack(p, i, element_size);
    if (inputs.grad_max && backend_ == Backend::kCpu) {
      matrix.grad_max = inputs.grad_max->const_data_ptr<double>()[num_matrices_];
    }
    ++num_matrices_;
    list.problems.push_back(matrix);
    list.sources.push_back(index);
  }
}

Problems::Problems(const std::vector<py::dict>& states, const Inputs& inputs,
                   SecondMoment second_moment)
    : device_(states.empty() ? at::Device(at::kCPU)
                             : StateReader(0, states[0], at::kCPU).tensor("exp_avg").device()),
      backend_(backend_of(states)) {
  check_length("params", inputs.params, states.size());
  check_length(inputs.grads_name, inputs.grads, states.size());
  check_length("updates", inputs.updates, states.size());
  check_length("streams", inputs.streams, states.size());
  check_length("offsets", inputs.offsets, states.size());
  if (inputs.grad_max) {
    const std::vector<int64_t> counts = count_matrices(states);
    const auto num = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    const at::Tensor& maxima = *inputs.grad_max;
    if (maxima.numel() != num || maxima.scalar_type() != at::kDouble ||
        maxima.device() != device_ || !maxima.is_contiguous()) {
      fail("grad_max",
           "float64 on " + device_.str() + ", one entry per matrix (" + std::to_string(num) + ")",
           describe(maxima));
    }
  }
  for (size_t i = 0; i < states.size(); ++i) {
    const StateReader state(i, states[i], device_);
    const at::Tensor exp_avg = state.tensor("exp_avg");
    if (exp_avg.scalar_type() == at::kDouble) {
      if (backend_ == Backend::kCuda) {
        fail(state.name("exp_avg"), "float32 on a GPU", describe(exp_avg));
      }
      append(wide, i, states[i], inputs, second_moment);
    } else {
      append(single, i, states[i], inputs, second_moment);
    }
  }
}

}  // namespace dykaf::bindings
