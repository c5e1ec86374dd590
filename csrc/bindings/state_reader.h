// The state of one parameter, from its dictionary to the fields of a Problem (dykaf/types.h) or of
// an aten::Matrix, with every check.
#pragma once

#include <functional>
#include <initializer_list>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/problems.h"

namespace dykaf::bindings {

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

  // The tensor of this shape, on the states' device unless said otherwise, into a field of a
  // Problem or of a Matrix; `dtype` is what a Problem's field is of.
  void read(at::Tensor& field, const char* key, at::IntArrayRef shape, at::ScalarType dtype) const {
    field = checked(key, shape, dtype, device_);
  }
  template <typename T>
  void read(T*& field, const char* key, at::IntArrayRef shape, at::ScalarType) const {
    field = checked(key, shape, c10::CppTypeToScalarType<T>::value, device_)
                .template mutable_data_ptr<T>();
  }
  template <typename Field>
  void read_optional(Field& field, const char* key, at::IntArrayRef shape,
                     at::ScalarType dtype) const {
    if (has(key)) read(field, key, shape, dtype);
  }
  // For what the host reads and writes on any backend.
  void read_host(int64_t*& field, const char* key, at::IntArrayRef shape) const {
    field = checked(key, shape, at::kLong, at::Device(at::kCPU)).mutable_data_ptr<int64_t>();
  }

  std::string name(const char* key) const { return prefix_ + "['" + key + "']"; }

 private:
  at::Tensor checked(const char* key, at::IntArrayRef shape, at::ScalarType dtype,
                     const at::Device& device) const {
    const at::Tensor value = tensor(key);
    if (value.scalar_type() != dtype || value.sizes() != shape || value.device() != device ||
        !value.is_contiguous()) {
      std::ostringstream expected;
      expected << "contiguous " << dtype << " " << shape << " on " << device;
      fail(name(key), expected.str(), describe(value));
    }
    return value;
  }

  std::string prefix_;
  const py::dict& state_;
  at::Device device_;
};

inline std::vector<int64_t> extend(at::IntArrayRef batch, std::initializer_list<int64_t> tail) {
  std::vector<int64_t> shape(batch.begin(), batch.end());
  shape.insert(shape.end(), tail);
  return shape;
}

// The dtypes of a state: its own, and that of the numbers which are double where a device has that.
struct StateDtypes {
  explicit StateDtypes(const StateReader& state)
      : own(state.tensor("exp_avg").scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
        wide(state.has("rho") && state.tensor("rho").scalar_type() == at::kFloat ? at::kFloat
                                                                                 : at::kDouble) {}

  at::ScalarType own;
  at::ScalarType wide;
};

// What the state of a skinny matrix has of its own.
template <typename Matrix>
void read_skinny(const StateReader& state, const StateDtypes& dtypes, at::IntArrayRef batch,
                 Matrix& p) {
  const at::Tensor basis = state.tensor("basis");
  const int64_t num_rows = basis.dim() >= 2 ? basis.size(-2) : 0;
  p.skinny_rank = num_rows / 2;
  if (p.skinny_rank < p.short_side() || num_rows > p.long_side()) {
    fail(state.name("basis"),
         "rows twice as many as the short side's length at least, and at most "
         "as many as columns",
         describe(basis));
  }
  state.read(p.basis, "basis", extend(batch, {num_rows, p.long_side()}), dtypes.own);
  state.read(p.core, "core", extend(batch, {num_rows, num_rows}), dtypes.own);
  state.read(p.flat, "flat", batch, dtypes.own);
  state.read_host(p.rows, "rows", extend(batch, {2}));
  const at::Tensor rows = state.tensor("rows");
  for (int64_t i = 0; i < rows.numel(); i += 2) {
    const int64_t inner = p.rows[i];
    const int64_t used = p.rows[i + 1];
    if (!rows_fit(p, inner, used)) {
      fail(state.name("rows"),
           "counts of rows with room for another gradient in " + std::to_string(num_rows),
           std::to_string(inner) + " and " + std::to_string(used));
    }
  }
  state.read(p.exp_avg_sq, "exp_avg_sq", extend(batch, {p.short_side(), p.skinny_rank + 1}),
             dtypes.own);
}

// The state of a matrix or a stack of them: batch + the tails below.
template <typename Matrix>
Matrix read_matrix(const StateReader& state, SecondMoment second_moment, at::IntArrayRef batch) {
  const StateDtypes dtypes(state);
  const at::Tensor exp_avg = state.tensor("exp_avg");
  Matrix p{};
  p.m = exp_avg.dim() >= 2 ? exp_avg.size(-2) : 1;
  p.n = exp_avg.dim() >= 2 ? exp_avg.size(-1) : exp_avg.numel();
  state.read(p.exp_avg, "exp_avg", extend(batch, {p.m, p.n}), dtypes.own);
  if (state.has("basis")) {
    read_skinny(state, dtypes, batch, p);
  } else if (second_moment == SecondMoment::kFull) {
    state.read(p.exp_avg_sq, "exp_avg_sq", extend(batch, {p.m, p.n}), dtypes.own);
  } else if (second_moment != SecondMoment::kNone) {
    state.read(p.exp_avg_sq_row, "exp_avg_sq_row", extend(batch, {p.m}), dtypes.own);
    state.read(p.exp_avg_sq_col, "exp_avg_sq_col", extend(batch, {p.n}), dtypes.own);
    if (second_moment == SecondMoment::kRankOne) {
      state.read(p.exp_avg_sq_scale, "exp_avg_sq_scale", batch, dtypes.wide);
    }
  }
  state.read_optional(p.L, "L", extend(batch, {p.m, p.m}), dtypes.own);
  state.read_optional(p.R, "R", extend(batch, {p.n, p.n}), dtypes.own);
  if (state.has("L")) state.read(p.Q_L, "Q_L", extend(batch, {p.m, p.m}), dtypes.own);
  if (state.has("R")) state.read(p.Q_R, "Q_R", extend(batch, {p.n, p.n}), dtypes.own);
  state.read(p.rho, "rho", extend(batch, {2}), dtypes.wide);
  if (p.is_unsided()) {
    if (state.has("next_refresh")) fail(state.name("L"), "a tensor here or at 'R'", "nothing");
    return p;
  }
  state.read_host(p.next_refresh, "next_refresh", extend(batch, {2}));
  state.read_host(p.refreshes, "refreshes", extend(batch, {2}));
  state.read_host(p.schedule_step, "schedule_step", batch);
  state.read(p.refresh_fallbacks, "refresh_fallbacks", batch, at::kLong);
  return p;
}

// The state of what is no matrix, seen as 1 x numel.
template <typename Matrix>
Matrix read_adamw(const StateReader& state) {
  const StateDtypes dtypes(state);
  const at::Tensor exp_avg = state.tensor("exp_avg");
  Matrix p{};
  p.m = 1;
  p.n = exp_avg.numel();
  state.read(p.exp_avg, "exp_avg", exp_avg.sizes(), dtypes.own);
  state.read(p.exp_avg_sq, "exp_avg_sq", exp_avg.sizes(), dtypes.own);
  return p;
}

inline int64_t numel_of(at::IntArrayRef shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// From an array of all matrices of a stack to that of matrix i, which has `shape`.
template <typename T>
void take(T*& array, int64_t i, at::IntArrayRef shape) {
  if (array != nullptr) array += i * numel_of(shape);
}
inline void take(at::Tensor& array, int64_t i, at::IntArrayRef shape) {
  if (!array.defined() || array.sizes() == shape) return;
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t dim = shape.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * shape[dim];
  array = array.as_strided(shape, strides, array.storage_offset() + i * numel_of(shape));
}

// Matrix `i` of a stack, but for what is not state.
template <typename Matrix>
Matrix matrix_of_stack(Matrix p, int64_t i) {
  const int64_t rows = 2 * p.skinny_rank;
  take(p.master, i, {p.m, p.n});
  take(p.exp_avg, i, {p.m, p.n});
  if (p.is_skinny()) {
    take(p.exp_avg_sq, i, {p.short_side(), p.skinny_rank + 1});
  } else {
    take(p.exp_avg_sq, i, {p.m, p.n});
  }
  take(p.exp_avg_sq_row, i, {p.m});
  take(p.exp_avg_sq_col, i, {p.n});
  take(p.exp_avg_sq_scale, i, {});
  take(p.L, i, {p.m, p.m});
  take(p.Q_L, i, {p.m, p.m});
  take(p.R, i, {p.n, p.n});
  take(p.Q_R, i, {p.n, p.n});
  take(p.basis, i, {rows, p.long_side()});
  take(p.core, i, {rows, rows});
  take(p.flat, i, {});
  take(p.rows, i, {2});
  take(p.rho, i, {2});
  take(p.step, i, {});
  take(p.next_refresh, i, {2});
  take(p.refreshes, i, {2});
  take(p.schedule_step, i, {});
  take(p.refresh_fallbacks, i, {});
  take(p.update_rms, i, {});
  for (int64_t& offset : p.refresh_offset) offset += i;
  p.stream += static_cast<uint64_t>(i);
  return p;
}

}  // namespace dykaf::bindings
