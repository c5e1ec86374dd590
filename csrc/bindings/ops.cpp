// The operations as Python functions: checks, dispatch by element type, the GIL released.
#include "dykaf/ops.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "bindings/problems.h"
#include "bindings/register.h"
#include "cpu/matmul_precision.h"

namespace dykaf::bindings {
namespace {

using States = std::vector<py::dict>;
using Offsets = std::vector<std::vector<int64_t>>;

std::optional<std::string> matmul_precision(const py::dict& options) {
  if (!options.contains("matmul_precision") || options["matmul_precision"].is_none()) return {};
  return py::cast<std::string>(options["matmul_precision"]);
}

// Runs body without the GIL, outside of autograd, at the precision that `options` names.
template <typename Body>
void run(const py::dict& options, const Body& body) {
  const cpu::MatmulPrecision precision(matmul_precision(options));
  const py::gil_scoped_release no_gil;
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  body();
}

// Rotated or plain gradients in the state's dtype, with their maxima.
Inputs with_grads(const TensorList& grads, const States& states) {
  return {.grads = grads, .grad_max = grad_max(grads, count_matrices(states))};
}

// The pointers of the matrices of `tensors`, which `Problems` has checked, in the order of `list`.
template <typename T>
std::vector<T*> matrix_pointers(const ProblemList<T>& list, const TensorList& tensors) {
  std::vector<T*> pointers;
  for (size_t i = 0; i < list.problems.size(); ++i) {
    const bool continues = i > 0 && list.sources[i - 1] == list.sources[i];
    pointers.push_back(continues ? pointers.back() + list.problems[i].size()
                                 : tensors[list.sources[i]].template mutable_data_ptr<T>());
  }
  return pointers;
}

TensorList allocate_like(const TensorList& tensors) {
  TensorList outputs;
  for (const at::Tensor& tensor : tensors) outputs.push_back(at::empty_like(tensor));
  return outputs;
}

at::Tensor grad_max_op(const TensorList& grads, const std::vector<int64_t>& counts) {
  const std::vector<double> maxima = grad_max(grads, counts);
  at::Tensor out = at::empty({static_cast<int64_t>(maxima.size())}, at::kDouble);
  std::copy(maxima.begin(), maxima.end(), out.mutable_data_ptr<double>());
  return out;
}

TensorList rotate_op(const TensorList& inputs, const States& states, bool into_basis,
                     const py::dict& options) {
  Problems problems(states, {.grads = inputs, .grads_name = "inputs"},
                    parse_options(options).second_moment);
  TensorList outputs = allocate_like(inputs);
  const Rotation rotation = into_basis ? Rotation::kIntoBasis : Rotation::kOutOfBasis;
  run(options, [&] {
    problems.for_each_type([&]<typename T>(ProblemList<T>& list) {
      const std::vector<T*> in = matrix_pointers(list, inputs);
      cpu::rotate<T>(list.problems, rotation, in.data(), matrix_pointers(list, outputs).data());
    });
  });
  return outputs;
}

TensorList adam_update_op(const TensorList& grads, const States& states, const py::dict& options) {
  const Options parsed = parse_options(options);
  Problems problems(states, with_grads(grads, states), parsed.second_moment);
  TensorList updates = allocate_like(grads);
  run(options, [&] {
    problems.for_each_type([&]<typename T>(ProblemList<T>& list) {
      cpu::adam_update_<T>(list.problems, parsed, matrix_pointers(list, updates).data());
    });
  });
  return updates;
}

void apply_update_op(const TensorList& params, const TensorList& updates, const States& states,
                     const std::vector<uint64_t>& streams, const py::dict& options) {
  const Options parsed = parse_options(options);
  Problems problems(states, {.params = params, .updates = updates, .streams = streams},
                    parsed.second_moment);
  run(options, [&] {
    problems.for_each_type([&]<typename T>(ProblemList<T>& list) {
      const std::vector<T*> pointers = matrix_pointers(list, updates);
      cpu::apply_update_<T>(list.problems, parsed, pointers.data());
    });
    problems.write_back();
  });
}

void factor_update_op(const TensorList& grads, const States& states, const py::dict& options) {
  const Options parsed = parse_options(options);
  Inputs inputs = with_grads(grads, states);
  inputs.needs_factors = true;
  Problems problems(states, inputs, parsed.second_moment);
  run(options, [&] {
    problems.for_each_type(
        [&]<typename T>(ProblemList<T>& list) { cpu::factor_update_<T>(list.problems, parsed); });
  });
}

void initialize_op(const TensorList& grads, const States& states, const Offsets& offsets,
                   const py::dict& options) {
  const Options parsed = parse_options(options);
  Inputs inputs = with_grads(grads, states);
  inputs.offsets = offsets;
  inputs.needs_factors = true;
  Problems problems(states, inputs, parsed.second_moment);
  run(options, [&] {
    problems.for_each_type(
        [&]<typename T>(ProblemList<T>& list) { cpu::initialize_<T>(list.problems, parsed); });
  });
}

void refresh_basis_op(const States& states, const std::string& side, const py::dict& options) {
  const Options parsed = parse_options(options);
  if (side != "left" && side != "right") fail("side", "'left' or 'right'", "'" + side + "'");
  Problems problems(states, {.needs_factors = true}, parsed.second_moment);
  run(options, [&] {
    problems.for_each_type([&]<typename T>(ProblemList<T>& list) {
      cpu::refresh_basis_<T>(list.problems, parsed, side == "left" ? Side::kLeft : Side::kRight);
    });
  });
}

void step_op(const TensorList& params, const TensorList& grads, const std::vector<double>& maxima,
             const States& states, const std::vector<uint64_t>& streams, const Offsets& offsets,
             const py::dict& options) {
  const Options parsed = parse_options(options);
  Problems problems(states,
                    {.params = params,
                     .grads = grads,
                     .grad_max = maxima,
                     .streams = streams,
                     .offsets = offsets},
                    parsed.second_moment);
  run(options, [&] {
    problems.for_each_type(
        [&]<typename T>(ProblemList<T>& list) { cpu::step_<T>(list.problems, parsed); });
    problems.write_back();
  });
}

}  // namespace

void register_ops(py::module_& module) {
  module.def("grad_max", &grad_max_op, py::arg("grads"), py::arg("counts"));
  module.def("rotate", &rotate_op, py::arg("inputs"), py::arg("states"), py::arg("into_basis"),
             py::arg("options"));
  module.def("adam_update_", &adam_update_op, py::arg("grads"), py::arg("states"),
             py::arg("options"));
  module.def("apply_update_", &apply_update_op, py::arg("params"), py::arg("updates"),
             py::arg("states"), py::arg("streams"), py::arg("options"));
  module.def("factor_update_", &factor_update_op, py::arg("grads"), py::arg("states"),
             py::arg("options"));
  module.def("initialize_", &initialize_op, py::arg("grads"), py::arg("states"), py::arg("offsets"),
             py::arg("options"));
  module.def("refresh_basis_", &refresh_basis_op, py::arg("states"), py::arg("side"),
             py::arg("options"));
  module.def("step_", &step_op, py::arg("params"), py::arg("grads"), py::arg("grad_max"),
             py::arg("states"), py::arg("streams"), py::arg("offsets"), py::arg("options"));
}

}  // namespace dykaf::bindings
