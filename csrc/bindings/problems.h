// From tensors to the problems of dykaf/types.h, with every check that the operations rely on.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "dykaf/types.h"

namespace dykaf::bindings {

using TensorList = std::vector<at::Tensor>;

// What an operation hands over beside the states. Empty lists: not used by the operation.
struct Inputs {
  TensorList params;                          // any strides, in the parameter's dtype
  TensorList grads;                           // contiguous; of the parameter's dtype or the state's
  std::vector<double> grad_max;               // one per matrix of each gradient; computed if empty
  std::vector<uint64_t> streams;              // one per parameter
  std::vector<std::vector<int64_t>> offsets;  // [left, right] per parameter
};

template <typename T>
struct ProblemList {
  std::vector<Problem<T>> problems;
  std::vector<size_t> sources;  // the index of the state that each problem belongs to
};

class Problems {
 public:
  // Raises ValueError naming the tensor, what was expected and what came.
  Problems(const std::vector<py::dict>& states, const Inputs& inputs, SecondMoment second_moment);

  ProblemList<float> single;
  ProblemList<double> wide;

  // Calls body(ProblemList<T>&) for each element type that occurs.
  template <typename Body>
  void for_each_type(const Body& body) {
    if (!single.problems.empty()) body(single);
    if (!wide.problems.empty()) body(wide);
  }

  // Copies parameters that are not contiguous back to where they came from.
  void write_back();

 private:
  template <typename T>
  void append(ProblemList<T>& list, size_t index, const py::dict& state, const Inputs& inputs,
              SecondMoment second_moment);
  const at::Tensor& contiguous_param(const at::Tensor& param);

  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;  // contiguous copy, original
  size_t num_matrices_ = 0;
};

// max|G| per matrix: gradient i is cut into counts[i] equal parts. Not finite: NaN.
std::vector<double> grad_max(const TensorList& grads, const std::vector<int64_t>& counts);

// From the group's dictionary; raises ValueError for a name that is missing or not known.
Options parse_options(const py::dict& options);

// Parsed from the group's "second_moment" and so on; raises ValueError naming `name`.
[[noreturn]] void fail(const std::string& name, const std::string& expected,
                       const std::string& got);

}  // namespace dykaf::bindings
