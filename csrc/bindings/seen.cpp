#include "bindings/seen.h"

#include <torch/csrc/autograd/python_variable.h>

namespace dykaf::bindings {
namespace {

// A class of its own may answer for its gradient or its memory in any way.
bool is_plain_tensor(PyObject* object) { return THPVariable_CheckExact(object); }

const void* memory_of(const at::Tensor& tensor) {
  return tensor.has_storage() ? tensor.const_data_ptr() : nullptr;
}

// Whether a step takes the gradient's memory as it is.
bool is_like(const at::Tensor& grad, const at::Tensor& param) {
  return !grad.is_neg() && grad.scalar_type() == param.scalar_type() &&
         grad.sizes() == param.sizes() && grad.device() == param.device() && grad.is_contiguous() &&
         param.is_contiguous();
}

}  // namespace

Seen::Tensor::Tensor(PyObject* object)
    : object(object),
      impl(THPVariable_Unpack(object).unsafeGetTensorImpl()),
      data(memory_of(THPVariable_Unpack(object))),
      dtype(THPVariable_Unpack(object).scalar_type()),
      sizes(THPVariable_Unpack(object).sizes()) {}

bool Seen::Tensor::is(PyObject* other) const {
  if (other != object || !is_plain_tensor(other)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(other);
  return tensor.unsafeGetTensorImpl() == impl && memory_of(tensor) == data &&
         tensor.scalar_type() == dtype && tensor.sizes() == at::IntArrayRef(sizes);
}

Seen::Seen(const py::list& groups, const py::dict& states) {
  for (const py::handle& group : groups) {
    const auto params = py::cast<py::list>(group);
    group_sizes_.push_back(params.size());
    for (const py::handle& param : params) {
      if (!is_plain_tensor(param.ptr())) {
        is_plain_ = false;
        return;
      }
      const at::Tensor& grad = THPVariable_Unpack(param.ptr()).grad();
      params_.push_back(
          {Tensor(param.ptr()), grad.defined() ? grad.key_set() : c10::DispatchKeySet()});
    }
  }
  for (const auto& [param, state] : states) {
    if (!PyDict_CheckExact(state.ptr())) {
      is_plain_ = false;
      return;
    }
    const auto tensors = py::reinterpret_borrow<py::dict>(state);
    states_.push_back({param.ptr(), state.ptr(), tensors.size()});
    for (const auto& [key, value] : tensors) {
      if (!is_plain_tensor(value.ptr())) {
        is_plain_ = false;
        return;
      }
      tensors_.emplace_back(value.ptr());
    }
  }
}

bool Seen::again(const py::list& groups, const py::dict& states, TensorList& params,
                 TensorList& grads) const {
  if (uses_aten_alone() != aten_alone_) return false;
  if (groups.size() != group_sizes_.size() || states.size() != states_.size()) return false;
  auto seen = params_.begin();
  for (size_t i = 0; i < groups.size(); ++i) {
    PyObject* group = PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(i));
    if (!PyList_CheckExact(group)) return false;
    if (static_cast<size_t>(PyList_GET_SIZE(group)) != group_sizes_[i]) return false;
    for (size_t k = 0; k < group_sizes_[i]; ++k, ++seen) {
      PyObject* object = PyList_GET_ITEM(group, static_cast<Py_ssize_t>(k));
      if (!seen->tensor.is(object)) return false;
      const at::Tensor& param = THPVariable_Unpack(object);
      const at::Tensor& grad = param.grad();
      if (grad.defined() == seen->grad_keys.empty()) return false;
      params.push_back(grad.defined() ? param : at::Tensor());
      grads.push_back(grad);
      if (!grad.defined()) continue;
      if (grad.key_set() != seen->grad_keys || !is_like(grad, param)) return false;
    }
  }
  auto state = states_.begin();
  auto tensor = tensors_.begin();
  PyObject* key = nullptr;
  PyObject* dict = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(states.ptr(), &at, &key, &dict); ++state) {
    if (key != state->param || dict != state->dict || !PyDict_CheckExact(dict)) return false;
    if (static_cast<size_t>(PyDict_GET_SIZE(dict)) != state->num_tensors) return false;
    PyObject* name = nullptr;
    PyObject* value = nullptr;
    for (Py_ssize_t inner = 0; PyDict_Next(dict, &inner, &name, &value); ++tensor) {
      if (!tensor->is(value) || !THPVariable_Unpack(value).is_contiguous()) return false;
    }
  }
  return true;
}

}  // namespace dykaf::bindings
