// What a step has found of parameters and state, to tell at the next one whether all is as it was.
#pragma once

#include <ATen/core/DimVector.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <vector>

#include "bindings/problems.h"

namespace dykaf::bindings {

// By addresses alone: nothing is kept alive, so that users may replace, move and free parameters
// and state between steps. What has come to the same address since serves as well, for what is
// compared is all that a step relies on.
class Seen {
 public:
  // `groups`: a list of parameters for each group; `states`: a dictionary of tensors by parameter.
  Seen(const py::list& groups, const py::dict& states);

  // Whether it saw objects of torch's own alone; others may be anything at the next look.
  bool is_plain() const { return is_plain_; }

  // Whether all is as it was, and each parameter has a gradient like the one it had, or none. Then
  // `params` and `grads` get those that have one, by their places among all parameters.
  bool again(const py::list& groups, const py::dict& states, TensorList& params,
             TensorList& grads) const;

 private:
  struct Tensor {
    const PyObject* object;
    const c10::TensorImpl* impl;
    const void* data;
    at::ScalarType dtype;
    at::DimVector sizes;

    explicit Tensor(PyObject* object);
    bool is(PyObject* other) const;
  };
  struct Param {
    Tensor tensor;
    c10::DispatchKeySet grad_keys;  // of its gradient; empty: none
  };
  struct State {
    const PyObject* param;
    const PyObject* dict;
    size_t num_tensors;
  };

  std::vector<size_t> group_sizes_;
  std::vector<Param> params_;
  std::vector<State> states_;
  std::vector<Tensor> tensors_;  // of all states, in their order
  bool aten_alone_ = uses_aten_alone();
  bool is_plain_ = true;
};

}  // namespace dykaf::bindings
