#include "aten/matrix.h"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <array>

namespace dykaf::aten {
namespace {

constexpr std::array kInputs = {&Matrix::grad, &Matrix::param, &Matrix::update, &Matrix::grad_max};

constexpr std::array kState = {
    &Matrix::master,
    &Matrix::exp_avg,
    &Matrix::exp_avg_sq,
    &Matrix::exp_avg_sq_row,
    &Matrix::exp_avg_sq_col,
    &Matrix::exp_avg_sq_scale,
    &Matrix::L,
    &Matrix::R,
    &Matrix::Q_L,
    &Matrix::Q_R,
    &Matrix::rho,
    &Matrix::basis,
    &Matrix::core,
    &Matrix::flat,
    &Matrix::step,
    &Matrix::refresh_fallbacks,
    &Matrix::update_rms,
};

at::Tensor without_ownership(const at::Tensor& x) {
  return at::from_blob(
      x.mutable_data_ptr(), x.sizes(), x.strides(), [](void*) {}, x.options(), x.device());
}

at::ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return at::kDouble;
    case DType::kFloat32:
      return at::kFloat;
    case DType::kBFloat16:
      return at::kBFloat16;
    case DType::kFloat16:
      return at::kHalf;
  }
  return at::kFloat;
}

}  // namespace

template <typename T>
Matrix::Matrix(const Problem<T>& p, at::Device device)
    : m(p.m),
      n(p.n),
      skinny_rank(p.skinny_rank),
      rows(p.rows),
      next_refresh(p.next_refresh),
      refreshes(p.refreshes),
      schedule_step(p.schedule_step),
      refresh_offset{p.refresh_offset[0], p.refresh_offset[1]},
      rate(p.rate),
      stream(p.stream),
      place(p.place) {
  const auto over = [&](const auto* data, at::IntArrayRef shape, at::ScalarType dtype) {
    if (data == nullptr) return at::Tensor();
    auto* memory = const_cast<void*>(static_cast<const void*>(data));
    return at::from_blob(memory, shape, at::TensorOptions().dtype(dtype).device(device));
  };
  const auto own = c10::CppTypeToScalarType<T>::value;
  grad = over(p.grad, {m, n}, scalar_type_of(p.dtype));
  param = over(p.param, {m, n}, scalar_type_of(p.dtype));
  if (device.is_cpu()) grad_max = over(&p.grad_max, {}, at::kDouble);
  master = over(p.master, {m, n}, own);
  exp_avg = over(p.exp_avg, {m, n}, own);
  if (p.is_skinny()) {
    exp_avg_sq = over(p.exp_avg_sq, {short_side(), skinny_rank + 1}, own);
  } else {
    exp_avg_sq = over(p.exp_avg_sq, {m, n}, own);
  }
  exp_avg_sq_row = over(p.exp_avg_sq_row, {m}, own);
  exp_avg_sq_col = over(p.exp_avg_sq_col, {n}, own);
  exp_avg_sq_scale = over(p.exp_avg_sq_scale, {}, at::kDouble);
  L = over(p.L, {m, m}, own);
  R = over(p.R, {n, n}, own);
  Q_L = over(p.Q_L, {m, m}, own);
  Q_R = over(p.Q_R, {n, n}, own);
  rho = over(p.rho, {2}, at::kDouble);
  basis = over(p.basis, {2 * skinny_rank, long_side()}, own);
  core = over(p.core, {2 * skinny_rank, 2 * skinny_rank}, own);
  flat = over(p.flat, {}, own);
  step = over(p.step, {}, at::kFloat);
  refresh_fallbacks = over(p.refresh_fallbacks, {}, at::kLong);
  update_rms = over(p.update_rms, {}, at::kFloat);
}

void Matrix::let_go_of_inputs() {
  for (const Array array : kInputs) (this->*array).reset();
}

void Matrix::disown_state() {
  for (const Array array : kState) {
    at::Tensor& tensor = this->*array;
    if (tensor.defined()) tensor = without_ownership(tensor);
  }
}

at::Tensor Batch::stacked(const std::vector<at::Tensor>& tensors) {
  return tensors.size() == 1 ? tensors[0].unsqueeze(0) : at::stack(tensors);
}

at::Tensor Batch::get(Array array) const {
  for (const auto& [key, values] : staged_) {
    if (key == array) return values;
  }
  return get_part([&](const Matrix& w) { return w.*array; });
}

void Batch::set(Array array, at::Tensor values) {
  for (auto& [key, staged] : staged_) {
    if (key == array) {
      staged = std::move(values);
      return;
    }
  }
  staged_.emplace_back(array, std::move(values));
}

void Batch::set_where(Array array, const at::Tensor& condition, const at::Tensor& values) {
  set(array, at::where(condition, values, get(array)));
}

void Batch::commit(const std::optional<at::Tensor>& skip) {
  std::vector<at::Tensor> targets;
  std::vector<at::Tensor> sources;
  const auto add = [&](const std::vector<at::Tensor>& to, const at::Tensor& values) {
    const at::Tensor kept = skip ? at::where(skip->ne(0), stacked(to), values) : values;
    targets.insert(targets.end(), to.begin(), to.end());
    for (at::Tensor& row : kept.unbind(0)) sources.push_back(std::move(row));
  };
  for (const auto& [array, values] : staged_) {
    add(parts([&, key = array](const Matrix& w) { return w.*key; }), values);
  }
  for (const auto& [to, values] : staged_parts_) add(to, values);
  if (!targets.empty()) at::_foreach_copy_(targets, sources);
  staged_.clear();
  staged_parts_.clear();
}

// Through pinned memory, so that the copy does not wait.
template <typename T>
at::Tensor Batch::on_device(const std::vector<T>& values, at::ScalarType dtype) const {
  const at::Tensor host =
      at::empty({static_cast<int64_t>(values.size())},
                at::TensorOptions().dtype(dtype).pinned_memory(device().is_cuda()));
  const auto fill = [&](auto* data) {
    std::transform(values.begin(), values.end(), data, [&](T value) {
      return static_cast<std::remove_pointer_t<decltype(data)>>(value);
    });
  };
  if (dtype == at::kLong) {
    fill(host.mutable_data_ptr<int64_t>());
  } else if (dtype == at::kDouble) {
    fill(host.mutable_data_ptr<double>());
  } else {
    fill(host.mutable_data_ptr<float>());
  }
  return host.to(device(), /*non_blocking=*/true);
}
template at::Tensor Batch::on_device(const std::vector<int64_t>&, at::ScalarType) const;
template at::Tensor Batch::on_device(const std::vector<double>&, at::ScalarType) const;

std::vector<int64_t> likeness(const Matrix& w) {
  std::vector<int64_t> key = {w.m, w.n, w.skinny_rank, w.place.run != 0};
  if (w.is_skinny()) key.insert(key.end(), {w.rows[0], w.rows[1]});
  const auto add = [&](const auto& arrays) {
    for (const Array array : arrays) {
      const at::Tensor& tensor = w.*array;
      key.push_back(tensor.defined() ? static_cast<int64_t>(tensor.scalar_type()) : -1);
    }
  };
  add(kInputs);
  add(kState);
  return key;
}

int64_t matrices_per_batch(const Matrix& w) {
  // Of the largest arrays; an operation takes a dozen of them.
  constexpr int64_t kMaxEntries = int64_t{1} << 24;
  int64_t largest = std::max<int64_t>(1, w.size());
  if (w.L.defined()) largest = std::max(largest, w.m * w.m);
  if (w.R.defined()) largest = std::max(largest, w.n * w.n);
  if (w.is_skinny()) largest = std::max(largest, 2 * w.skinny_rank * w.long_side());
  return std::max<int64_t>(1, kMaxEntries / largest);
}

template Matrix::Matrix(const Problem<float>&, at::Device);
template Matrix::Matrix(const Problem<double>&, at::Device);

}  // namespace dykaf::aten
