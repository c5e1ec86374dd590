// Matrices with their optimizer state as tensors on any device, and batches of those that are
// alike.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "aten/torch.h"
#include "dykaf/types.h"

namespace dykaf::aten {

// One matrix: the fields of dykaf/types.h's Problem with the same names and shapes; undefined where
// the matrix has none. What is double there has the dtype of rho, float32 where a device has no
// float64.
struct Matrix {
  int64_t m = 0;
  int64_t n = 0;
  at::Tensor grad;      // [m, n], contiguous
  at::Tensor param;     // [m, n], contiguous
  at::Tensor update;    // [m, n], of a single operation: what it takes or gives
  at::Tensor grad_max;  // []
  at::Tensor master;
  at::Tensor exp_avg;
  at::Tensor exp_avg_sq;
  at::Tensor exp_avg_sq_row;
  at::Tensor exp_avg_sq_col;
  at::Tensor exp_avg_sq_scale;
  at::Tensor L;
  at::Tensor R;
  at::Tensor Q_L;
  at::Tensor Q_R;
  at::Tensor rho;
  at::Tensor basis;
  at::Tensor core;
  at::Tensor flat;
  at::Tensor step;
  at::Tensor refresh_fallbacks;
  at::Tensor update_rms;

  // On the host, as in Problem.
  int64_t skinny_rank = 0;
  int64_t* rows = nullptr;
  int64_t* next_refresh = nullptr;
  int64_t* refreshes = nullptr;
  int64_t* schedule_step = nullptr;
  int64_t refresh_offset[2] = {0, 0};
  Rate rate = {};
  uint64_t stream = 0;
  Place place = {};

  Matrix() = default;
  // Over the memory of a problem on `device`.
  template <typename T>
  explicit Matrix(const Problem<T>& p, at::Device device = at::kCPU);

  void let_go_of_inputs();
  // Of the state, what is left is addresses.
  void disown_state();

  bool is_adamw() const { return !rho.defined(); }
  bool is_unsided() const { return !L.defined() && !R.defined(); }
  bool is_skinny() const { return basis.defined(); }
  bool is_wide() const { return m < n; }
  bool is_full() const { return is_skinny() && rows[1] + short_side() > 2 * skinny_rank; }
  bool has_factor(Side side) const {
    return (side == Side::kLeft ? L : R).defined() || is_skinny();
  }
  bool is_long(Side side) const { return is_skinny() && (side == Side::kRight) == is_wide(); }
  int64_t size() const { return m * n; }
  int64_t short_side() const { return is_wide() ? m : n; }
  int64_t long_side() const { return is_wide() ? n : m; }
  int64_t rotated_side() const {
    return std::max(Q_L.defined() ? m : int64_t{0}, Q_R.defined() ? n : int64_t{0});
  }
};

using Array = at::Tensor Matrix::*;

// What a group's step needs beside the matrices; tensors of one element on their device.
struct Inputs {
  const Options& options;
  std::optional<at::Tensor> skip = {};       // int32, not 0: change nothing
  std::optional<at::Tensor> amp_scale = {};  // float32, GradScaler's; gradients are divided by it
  std::optional<at::Tensor> lr = {};         // float32, in place of every rate's
};

// Matrices with the same arrays of the same shapes and dtypes. An operation works on all of them at
// once, the batch first in every tensor: launches do not grow with the number of matrices. What it
// finds is kept aside until commit(), so that a failure leaves the matrices as they were.
class Batch {
 public:
  explicit Batch(std::vector<const Matrix*> matrices) : matrices_(std::move(matrices)) {}

  const Matrix& first() const { return *matrices_[0]; }
  const std::vector<const Matrix*>& matrices() const { return matrices_; }
  int64_t size() const { return static_cast<int64_t>(matrices_.size()); }
  at::Device device() const { return first().step.device(); }
  at::ScalarType dtype() const {
    const Matrix& w = first();
    return (w.exp_avg.defined() ? w.exp_avg : w.update).scalar_type();
  }
  // Of what Problem holds in double.
  at::ScalarType wide_dtype() const {
    const Matrix& w = first();
    return (w.rho.defined() ? w.rho : w.grad_max).scalar_type();
  }

  // [b, ...]: what is staged, else what is there. Not to be changed in place.
  at::Tensor get(Array array) const;
  // Of `part(matrix)` of each matrix.
  template <typename Part>
  at::Tensor get_part(const Part& part) const {
    return stacked(parts(part));
  }
  // Stages values [b, ...].
  void set(Array array, at::Tensor values);
  template <typename Part>
  void set_part(const Part& part, at::Tensor values) {
    staged_parts_.emplace_back(parts(part), std::move(values));
  }
  // Stages `values` where `condition` [b, 1...] holds.
  void set_where(Array array, const at::Tensor& condition, const at::Tensor& values);

  // Copies what is staged to the matrices; nothing where *skip is not 0.
  void commit(const std::optional<at::Tensor>& skip = std::nullopt);

  // Numbers of each matrix as a tensor [b] on the device; no host waits.
  template <typename Number>
  at::Tensor reals(const Number& number) const {
    std::vector<double> values;
    for (const Matrix* w : matrices_) values.push_back(number(*w));
    return on_device(values, wide_dtype());
  }
  // Integers likewise.
  template <typename Number>
  at::Tensor numbers(const Number& number) const {
    std::vector<int64_t> values;
    for (const Matrix* w : matrices_) values.push_back(number(*w));
    return on_device(values, at::kLong);
  }

 private:
  template <typename Part>
  std::vector<at::Tensor> parts(const Part& part) const {
    std::vector<at::Tensor> tensors;
    for (const Matrix* w : matrices_) tensors.push_back(part(*w));
    return tensors;
  }
  static at::Tensor stacked(const std::vector<at::Tensor>& tensors);
  template <typename T>
  at::Tensor on_device(const std::vector<T>& values, at::ScalarType dtype) const;

  std::vector<const Matrix*> matrices_;
  std::vector<std::pair<Array, at::Tensor>> staged_;
  std::vector<std::pair<std::vector<at::Tensor>, at::Tensor>> staged_parts_;
};

// x [b] as [b, 1, 1].
inline at::Tensor per_matrix(const at::Tensor& x) { return x.unsqueeze(-1).unsqueeze(-1); }

// What matrices of one batch have in common.
std::vector<int64_t> likeness(const Matrix& w);

// How many matrices like this one go in one batch, for memory's sake.
int64_t matrices_per_batch(const Matrix& w);

// Calls body(Batch) for those of `matrices` that are alike, and have the same more(matrix).
template <typename More, typename Body>
void for_each_batch(const std::vector<const Matrix*>& matrices, const More& more,
                    const Body& body) {
  std::map<std::pair<std::vector<int64_t>, int64_t>, std::vector<const Matrix*>> batches;
  for (const Matrix* w : matrices) batches[{likeness(*w), more(*w)}].push_back(w);
  for (const auto& [key, alike] : batches) {
    const auto most = static_cast<size_t>(matrices_per_batch(*alike[0]));
    for (size_t begin = 0; begin < alike.size(); begin += most) {
      const size_t end = std::min(alike.size(), begin + most);
      body(Batch({alike.begin() + static_cast<std::ptrdiff_t>(begin),
                  alike.begin() + static_cast<std::ptrdiff_t>(end)}));
    }
  }
}

}  // namespace dykaf::aten
