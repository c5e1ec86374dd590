// From tensors to the problems of dykaf/types.h and the matrices of aten/matrix.h, with every check
// that the operations rely on.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "aten/matrix.h"
#include "bindings/device.h"
#include "dykaf/types.h"

namespace dykaf::bindings {

using TensorList = std::vector<at::Tensor>;

// What an operation hands over beside the states; what it does not use is left out. Lists have one
// entry per state.
struct Inputs {
  std::optional<TensorList> params = {};    // any strides, in the parameter's dtype
  std::optional<TensorList> grads = {};     // contiguous; of the parameters' dtype, if given, or T
  std::optional<TensorList> updates = {};   // contiguous; of type T; what comes in or goes out
  std::optional<at::Tensor> grad_max = {};  // one per matrix of each gradient, from grad_max()
  std::optional<std::vector<uint64_t>> streams = {};
  std::vector<Rate> rates = {};
  std::vector<std::array<uint64_t, 3>> places = {};  // the fields of each Place; none: whole ones
  std::optional<std::vector<std::vector<int64_t>>> offsets = {};  // [left, right]
  bool needs_moments = true;         // else step and master are all that is read of a state
  bool needs_matrices = false;       // what AdamW updates is an error
  bool needs_factors = false;        // and so is a matrix without factors
  bool needs_dense = false;          // a skinny matrix is an error
  const char* grads_name = "grads";  // in messages
};

// Matrix is Problem<T> or aten::Matrix.
template <typename Matrix>
struct MatrixList {
  std::vector<Matrix> matrices;
  std::vector<size_t> sources;   // the index of the state that each matrix belongs to
  std::vector<int64_t> members;  // of each matrix: its place in that stack
  std::vector<size_t> places;    // of each matrix among those of all states
};
template <typename T>
using ProblemList = MatrixList<Problem<T>>;

// Whether a skinny matrix may have so many orthonormal rows, and rows in use: one gradient at least
// has room beside them.
template <typename Matrix>
bool rows_fit(const Matrix& p, int64_t inner, int64_t used) {
  return 0 <= inner && inner <= p.skinny_rank && inner <= used &&
         used <= 2 * p.skinny_rank - p.short_side();
}

class Problems {
 public:
  // Raises ValueError naming the tensor, what was expected and what came.
  Problems(const std::vector<py::dict>& states, const Inputs& inputs, const Options& options);

  // By the backend that serves them.
  ProblemList<float> single;  // cpu
  ProblemList<double> wide;   // cpu
  ProblemList<float> cuda;
  MatrixList<aten::Matrix> aten;

  // Where all tensors are, but those that types.h places on the host.
  const at::Device& device() const { return device_; }

  // max|G| of the matrices at `places` of all; nothing where none came in.
  std::optional<at::Tensor> maxima_of(const std::vector<size_t>& places) const;

  // Lets go of every tensor that came in. What is left serves renew(), if true; the tensors of all
  // states, and the parameters' memory, must be where they were then.
  bool keep();
  // The next step's tensors, which are like those that came in before.
  void renew(const TensorList& params, const TensorList& grads, const at::Tensor& grad_max,
             const std::vector<Rate>& rates);
  // max|G| of each matrix, with gradients like those that came in.
  at::Tensor grad_max_of(const TensorList& grads) const;
  // Whether the values of state say more than its addresses: that the host is to look at gradients
  // on a device before it knows what a step does, or that counts of rows do not fit.
  bool needs_a_look() const;

  // Copies parameters that are not contiguous back to where they came from, and tells autograd that
  // all of them were changed in place.
  void write_back();

 private:
  template <typename Matrix>
  void append(MatrixList<Matrix>& list, size_t index, const py::dict& state, const Inputs& inputs,
              const Options& options);
  const at::Tensor& contiguous_param(const at::Tensor& param);

  template <typename Matrix>
  void renew(MatrixList<Matrix>& list, const TensorList& grads, const std::vector<Rate>& rates);

  at::Device device_;
  TensorList params_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;  // contiguous copy, original
  std::optional<at::Tensor> grad_max_;
  size_t num_matrices_ = 0;
  bool is_kept_ = false;
};

// The entries of a vector at `places`, which ascend. Where they are a range nothing is copied to
// the device, as a captured step must not.
at::Tensor entries(const at::Tensor& vector, const std::vector<size_t>& places);

// The number of matrices that each state holds.
std::vector<int64_t> count_matrices(const std::vector<py::dict>& states);

// max|G| per matrix on the gradients' device, float64 where it has that: gradient i is cut into
// counts[i] equal parts. Not finite: NaN.
at::Tensor grad_max(const TensorList& grads, const std::vector<int64_t>& counts);

// From the group's dictionary; raises ValueError for a name that is missing or not known. `device`
// says which of torch's settings a precision of None follows.
Options parse_options(const py::dict& options, const at::Device& device);
Rate parse_rate(const py::dict& options);

// Where the tensors of `states` are; the CPU for none.
at::Device device_of(const std::vector<py::dict>& states);

// Dtype, shape, device and layout, for messages.
std::string describe(const at::Tensor& tensor);

// Raises ValueError "name: expected ..., got ...".
[[noreturn]] void fail(const std::string& name, const std::string& expected,
                       const std::string& got);

}  // namespace dykaf::bindings
