// The operations as Python functions: checks, dispatch by element type, the GIL released.
#include "dykaf/ops.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <sstream>

#include "bindings/device_ops.h"
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

// Rotated or plain gradients in the state's dtype, with their maxima.
Inputs with_grads(const TensorList& grads, const States& states) {
  return {.grads = grads, .grad_max = grad_max(grads, count_matrices(states))};
}

// What a GPU's products run at: the option, or what torch's own products do there.
[[maybe_unused]] cuda::MatmulPrecision device_precision(const std::optional<std::string>& name) {
  if (name) {
    return *name == "highest" ? cuda::MatmulPrecision::kHighest
           : *name == "high"  ? cuda::MatmulPrecision::kHigh
                              : cuda::MatmulPrecision::kMedium;
  }
  const auto precision =
      at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32   ? cuda::MatmulPrecision::kHigh
         : precision == at::Float32Precision::BF16 ? cuda::MatmulPrecision::kMedium
                                                   : cuda::MatmulPrecision::kHighest;
}

// Runs the operation without the GIL, outside of autograd, at the precision that `options` names:
// on_cpu(ProblemList<T>&) for each element type that occurs, or on_device(const DeviceGroup&).
template <typename OnCpu, typename OnDevice>
void run(Problems& problems, [[maybe_unused]] const Options& parsed, const py::dict& options,
         const OnCpu& on_cpu, [[maybe_unused]] const OnDevice& on_device) {
  const std::optional<std::string> precision_name = matmul_precision(options);
  const py::gil_scoped_release no_gil;
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  if (problems.backend() == Backend::kCpu) {
    const cpu::MatmulPrecision precision(precision_name);
    problems.for_each_type(on_cpu);
  } else {
#if defined(DYKAF_WITH_CUDA)
    on_device(DeviceGroup{problems.single.problems, parsed, problems.device(),
                          device_precision(precision_name)});
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

// For what a GPU reads while a step runs.
void check_scalar(const char* name, const std::optional<at::Tensor>& value, at::ScalarType dtype,
                  const Problems& problems) {
  if (!value) return;
  if (problems.backend() == Backend::kCpu) fail(name, "nothing on the CPU", "a tensor");
  if (value->scalar_type() != dtype || value->numel() != 1 ||
      value->device() != problems.device()) {
    std::ostringstream expected;
    expected << dtype << " [1] on " << problems.device();
    fail(name, expected.str(), describe(*value));
  }
}

TensorList allocate_like(const TensorList& tensors) {
  TensorList outputs;
  for (const at::Tensor& tensor : tensors) outputs.push_back(at::empty_like(tensor));
  return outputs;
}

TensorList rotate_op(const TensorList& inputs, const States& states, bool into_basis,
                     const py::dict& options) {
  const Options parsed = parse_options(options);
  Problems problems(
      states, {.grads = inputs, .needs_factors = true, .needs_dense = true, .grads_name = "inputs"},
      parsed.second_moment);
  TensorList outputs = allocate_like(inputs);
  const Rotation rotation = into_basis ? Rotation::kIntoBasis : Rotation::kOutOfBasis;
  run(
      problems, parsed, options,
      [&]<typename T>(ProblemList<T>& list) {
        const std::vector<T*> in = matrix_pointers(list, inputs);
        cpu::rotate<T>(list.problems, rotation, in.data(), matrix_pointers(list, outputs).data());
      },
      [&](const auto& group) {
        const std::vector<float*> in = matrix_pointers(problems.single, inputs);
        rotate_on_device(group, rotation, in.data(),
                         matrix_pointers(problems.single, outputs).data());
      });
  return outputs;
}

TensorList adam_update_op(const TensorList& grads, const States& states, const py::dict& options) {
  const Options parsed = parse_options(options);
  Inputs inputs = with_grads(grads, states);
  inputs.needs_dense = true;
  Problems problems(states, inputs, parsed.second_moment);
  TensorList updates = allocate_like(grads);
  run(
      problems, parsed, options,
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
  const Options parsed = parse_options(options);
  Problems problems(states, {.params = params, .updates = updates, .streams = streams},
                    parsed.second_moment);
  run(
      problems, parsed, options,
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
  const Options parsed = parse_options(options);
  Inputs inputs = with_grads(grads, states);
  inputs.needs_factors = inputs.needs_dense = true;
  Problems problems(states, inputs, parsed.second_moment);
  run(
      problems, parsed, options,
      [&]<typename T>(ProblemList<T>& list) { cpu::factor_update_<T>(list.problems, parsed); },
      [&](auto group) {
        group.grad_max = inputs.grad_max;
        factor_update_on_device_(group);
      });
}

void initialize_op(const TensorList& grads, const States& states, const Offsets& offsets,
                   const py::dict& options) {
  const Options parsed = parse_options(options);
  Inputs inputs = with_grads(grads, states);
  inputs.offsets = offsets;
  inputs.needs_factors = true;
  Problems problems(states, inputs, parsed.second_moment);
  run(
      problems, parsed, options,
      [&]<typename T>(ProblemList<T>& list) { cpu::initialize_<T>(list.problems, parsed); },
      [&](auto group) {
        group.grad_max = inputs.grad_max;
        initialize_on_device_(group);
      });
}

void refresh_basis_op(const States& states, const std::string& side, const py::dict& options) {
  const Options parsed = parse_options(options);
  if (side != "left" && side != "right") fail("side", "'left' or 'right'", "'" + side + "'");
  const Side which = side == "left" ? Side::kLeft : Side::kRight;
  Problems problems(states, {.needs_factors = true}, parsed.second_moment);
  run(
      problems, parsed, options,
      [&]<typename T>(ProblemList<T>& list) {
        cpu::refresh_basis_<T>(list.problems, parsed, which);
      },
      [&](const auto& group) { refresh_basis_on_device_(group, which); });
}

void refresh_due_op(const States& states, const Offsets& offsets, const py::dict& options) {
  const Options parsed = parse_options(options);
  Problems problems(states, {.offsets = offsets}, parsed.second_moment);
  run(
      problems, parsed, options,
      [&]<typename T>(ProblemList<T>& list) { cpu::refresh_due_<T>(list.problems, parsed); },
      [&](const auto& group) { refresh_due_on_device_(group); });
}

void step_op(const TensorList& params, const TensorList& grads, const at::Tensor& maxima,
             const States& states, const std::vector<uint64_t>& streams, const Offsets& offsets,
             const py::dict& options, const std::optional<at::Tensor>& skip,
             const std::optional<at::Tensor>& amp_scale, const std::optional<at::Tensor>& lr,
             bool refresh) {
  const Options parsed = parse_options(options);
  const Refreshes refreshes = refresh ? Refreshes::kWithStep : Refreshes::kApart;
  Problems problems(states,
                    {.params = params,
                     .grads = grads,
                     .grad_max = maxima,
                     .streams = streams,
                     .offsets = offsets},
                    parsed.second_moment);
  check_scalar("skip", skip, at::kInt, problems);
  check_scalar("amp_scale", amp_scale, at::kFloat, problems);
  check_scalar("lr", lr, at::kFloat, problems);
  run(
      problems, parsed, options,
      [&]<typename T>(ProblemList<T>& list) { cpu::step_<T>(list.problems, parsed, refreshes); },
      [&](auto group) {
        group.grad_max = maxima;
        group.skip = skip;
        group.amp_scale = amp_scale;
        group.lr = lr;
        step_on_device_(group, refreshes);
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
             py::arg("options"));
  module.def("step_", &step_op, py::arg("params"), py::arg("grads"), py::arg("grad_max"),
             py::arg("states"), py::arg("streams"), py::arg("offsets"), py::arg("options"),
             py::arg("skip") = py::none(), py::arg("amp_scale") = py::none(),
             py::arg("lr") = py::none(), py::arg("refresh") = true);
}

}  // namespace dykaf::bindings
