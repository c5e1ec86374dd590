// The operations as Python functions: checks, dispatch by element type, the GIL released.
#include "dykaf/ops.h"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "bindings/device_ops.h"
#include "bindings/problems.h"
#include "bindings/register.h"

namespace dykaf::bindings {
namespace {

using States = std::vector<py::dict>;
using Offsets = std::vector<std::vector<int64_t>>;

// Rotated or plain gradients in the state's dtype, with their maxima.
Inputs with_grads(const TensorList& grads, const States& states) {
  return {.grads = grads, .grad_max = grad_max(grads, count_matrices(states))};
}

// Runs the operation without the GIL, apart from what torch is told outside:
// on_cpu(ProblemList<T>&) for each element type that occurs, or on_device(const DeviceGroup&).
template <typename OnCpu, typename OnDevice>
void run(Problems& problems, [[maybe_unused]] const Options& parsed, const OnCpu& on_cpu,
         [[maybe_unused]] const OnDevice& on_device) {
  const py::gil_scoped_release no_gil;
  const Apart apart;
  if (problems.backend() == Backend::kCpu) {
    problems.for_each_type(on_cpu);
  } else {
#if defined(DYKAF_WITH_CUDA)
    on_device(DeviceGroup{problems.single.problems, parsed, problems.device(), parsed.precision});
#endif
  }
  problems.write_back();
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

void copy(const TensorList& to, const TensorList& from) {
  if (!to.empty()) at::_foreach_copy_(to, from);
}

TensorList allocate_like(const TensorList& tensors) {
  TensorList outputs;
  for (const at::Tensor& tensor : tensors) outputs.push_back(at::empty_like(tensor));
  return outputs;
}

TensorList rotate_op(const TensorList& inputs, const States& states, bool into_basis,
                     const py::dict& options) {
  const Options parsed = parse_options(options, backend_of(states));
  Problems problems(
      states, {.grads = inputs, .needs_factors = true, .needs_dense = true, .grads_name = "inputs"},
      parsed.second_moment);
  TensorList outputs = allocate_like(inputs);
  const Rotation rotation = into_basis ? Rotation::kIntoBasis : Rotation::kOutOfBasis;
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) {
        const std::vector<T*> in = matrix_pointers(list, inputs);
        cpu::rotate<T>(list.problems, rotation, parsed.precision, in.data(),
                       matrix_pointers(list, outputs).data());
      },
      [&](const auto& group) {
        const std::vector<float*> in = matrix_pointers(problems.single, inputs);
        rotate_on_device(group, rotation, in.data(),
                         matrix_pointers(problems.single, outputs).data());
      });
  return outputs;
}

TensorList adam_update_op(const TensorList& grads, const States& states, const py::dict& options) {
  const Options parsed = parse_options(options, backend_of(states));
  Inputs inputs = with_grads(grads, states);
  inputs.needs_dense = true;
  Problems problems(states, inputs, parsed.second_moment);
  TensorList updates = allocate_like(grads);
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) {
        cpu::adam_update_<T>(list.problems, parsed, matrix_pointers(list, updates).data());
      },
      [&](auto group) {
        group.grad_max = inputs.grad_max;
        adam_update_on_device_(group, matrix_pointers(problems.single, updates).data());
      });
  return updates;
}

void apply_update_op(const TensorList& params, const TensorList& updates, const States& states,
                     const std::vector<uint64_t>& streams, const py::dict& options) {
  const Options parsed = parse_options(options, backend_of(states));
  Problems problems(states, {.params = params, .updates = updates, .streams = streams},
                    parsed.second_moment);
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) {
        const std::vector<T*> pointers = matrix_pointers(list, updates);
        cpu::apply_update_<T>(list.problems, parsed, pointers.data());
      },
      [&](const auto& group) {
        const std::vector<float*> pointers = matrix_pointers(problems.single, updates);
        apply_update_on_device_(group, pointers.data());
      });
}

void factor_update_op(const TensorList& grads, const States& states, const py::dict& options) {
  const Options parsed = parse_options(options, backend_of(states));
  Inputs inputs = with_grads(grads, states);
  inputs.needs_factors = inputs.needs_dense = true;
  Problems problems(states, inputs, parsed.second_moment);
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) { cpu::factor_update_<T>(list.problems, parsed); },
      [&](auto group) {
        group.grad_max = inputs.grad_max;
        factor_update_on_device_(group);
      });
}

void initialize_op(const TensorList& grads, const States& states, const Offsets& offsets,
                   const py::dict& options) {
  const Options parsed = parse_options(options, backend_of(states));
  Inputs inputs = with_grads(grads, states);
  inputs.offsets = offsets;
  inputs.needs_factors = true;
  Problems problems(states, inputs, parsed.second_moment);
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) { cpu::initialize_<T>(list.problems, parsed); },
      [&](auto group) {
        group.grad_max = inputs.grad_max;
        initialize_on_device_(group);
      });
}

void refresh_basis_op(const States& states, const std::string& side, const py::dict& options) {
  const Options parsed = parse_options(options, backend_of(states));
  if (side != "left" && side != "right") fail("side", "'left' or 'right'", "'" + side + "'");
  const Side which = side == "left" ? Side::kLeft : Side::kRight;
  Problems problems(states, {.needs_factors = true}, parsed.second_moment);
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) {
        cpu::refresh_basis_<T>(list.problems, parsed, which);
      },
      [&](const auto& group) { refresh_basis_on_device_(group, which); });
}

void refresh_due_op(const States& states, const Offsets& offsets, const py::dict& options,
                    const TensorList& kept, const TensorList& full) {
  const Options parsed = parse_options(options, backend_of(states));
  Problems problems(states, {.offsets = offsets}, parsed.second_moment);
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) {
        copy(full, kept);
        cpu::refresh_due_<T>(list.problems, parsed);
        copy(kept, full);
      },
      [&](const auto& group) {
        copy(full, kept);
        refresh_due_on_device_(group);
        copy(kept, full);
      });
}

}  // namespace

void register_ops(py::module_& module) {
  module.def(
      "backend_of",
      [](const at::Tensor& tensor, const std::string& name) {
        return backend_of(name, tensor) == Backend::kCpu ? "cpu" : "cuda";
      },
      py::arg("tensor"), py::arg("name"));
  module.def("grad_max", &grad_max, py::arg("grads"), py::arg("counts"));
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
  module.def("refresh_due_", &refresh_due_op, py::arg("states"), py::arg("offsets"),
             py::arg("options"), py::arg("kept") = TensorList(), py::arg("full") = TensorList());
}

}  // namespace dykaf::bindings
