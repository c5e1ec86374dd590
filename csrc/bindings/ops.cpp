// The operations as Python functions: checks, dispatch by element type, the GIL released.
#include "dykaf/ops.h"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "aten/ops.h"
#include "bindings/cuda_products.h"
#include "bindings/on_cuda.h"
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
// on_cpu(ProblemList<T>&) for each element type that occurs, on_cuda(CudaGroup),
// on_aten(matrices, inputs).
template <typename OnCpu, typename OnCuda, typename OnAten>
void run(Problems& problems, const Options& parsed, const OnCpu& on_cpu,
         [[maybe_unused]] const OnCuda& on_cuda, const OnAten& on_aten) {
  const py::gil_scoped_release no_gil;
  const Apart apart;
  if (!problems.single.matrices.empty()) on_cpu(problems.single);
  if (!problems.wide.matrices.empty()) on_cpu(problems.wide);
#if defined(DYKAF_WITH_CUDA)
  if (!problems.cuda.matrices.empty()) {
    on_cuda(CudaGroup{problems.cuda.matrices, parsed, problems.device(), parsed.precision,
                      problems.maxima_of(problems.cuda.places)});
  }
#endif
  if (!problems.aten.matrices.empty()) {
    on_aten(problems.aten.matrices, aten::Inputs{.options = parsed});
  }
  problems.write_back();
}

// The pointers of the matrices of `tensors`, which `Problems` has checked, in the order of `list`.
template <typename T>
std::vector<T*> matrix_pointers(const ProblemList<T>& list, const TensorList& tensors) {
  std::vector<T*> pointers;
  for (size_t i = 0; i < list.matrices.size(); ++i) {
    const bool continues = i > 0 && list.sources[i - 1] == list.sources[i];
    pointers.push_back(continues ? pointers.back() + list.matrices[i].size()
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
  const Options parsed = parse_options(options, device_of(states));
  TensorList outputs = allocate_like(inputs);
  Problems problems(states,
                    {.grads = inputs,
                     .updates = outputs,
                     .needs_factors = true,
                     .needs_dense = true,
                     .grads_name = "inputs"},
                    parsed);
  const Rotation rotation = into_basis ? Rotation::kIntoBasis : Rotation::kOutOfBasis;
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) {
        const std::vector<T*> in = matrix_pointers(list, inputs);
        cpu::rotate<T>(list.matrices, rotation, parsed.precision, in.data(),
                       matrix_pointers(list, outputs).data());
      },
      [&](const auto& group) {
        const std::vector<float*> in = matrix_pointers(problems.cuda, inputs);
        rotate_on_cuda(group, rotation, in.data(), matrix_pointers(problems.cuda, outputs).data());
      },
      [&](const auto& matrices, const auto& given) { aten::rotate(matrices, given, rotation); });
  return outputs;
}

TensorList adam_update_op(const TensorList& grads, const States& states, const py::dict& options) {
  const Options parsed = parse_options(options, device_of(states));
  Inputs inputs = with_grads(grads, states);
  inputs.needs_dense = true;
  TensorList updates = allocate_like(grads);
  inputs.updates = updates;
  Problems problems(states, inputs, parsed);
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) {
        cpu::adam_update_<T>(list.matrices, parsed, matrix_pointers(list, updates).data());
      },
      [&](const auto& group) {
        adam_update_on_cuda_(group, matrix_pointers(problems.cuda, updates).data());
      },
      [](const auto& matrices, const auto& given) { aten::adam_update_(matrices, given); });
  return updates;
}

void orthogonalize_op(const TensorList& updates, const States& states, const py::dict& options) {
  const Options parsed = parse_options(options, device_of(states));
  Problems problems(states, {.updates = updates, .needs_matrices = true, .needs_dense = true},
                    parsed);
  if (parsed.orthogonalize == 0) return;
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) {
        cpu::orthogonalize_<T>(list.matrices, parsed, matrix_pointers(list, updates).data());
      },
      [&](const auto& group) {
        orthogonalize_on_cuda_(group, matrix_pointers(problems.cuda, updates).data());
      },
      [](const auto& matrices, const auto& given) { aten::orthogonalize_(matrices, given); });
}

void apply_update_op(const TensorList& params, const TensorList& updates, const States& states,
                     const std::vector<uint64_t>& streams, const py::dict& options,
                     const std::vector<std::array<uint64_t, 3>>& places) {
  const Options parsed = parse_options(options, device_of(states));
  Problems problems(states,
                    {.params = params,
                     .updates = updates,
                     .streams = streams,
                     .rates = std::vector<Rate>(states.size(), parse_rate(options)),
                     .places = places,
                     .needs_moments = false},
                    parsed);
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) {
        const std::vector<T*> pointers = matrix_pointers(list, updates);
        cpu::apply_update_<T>(list.matrices, parsed, pointers.data());
      },
      [&](const auto& group) {
        const std::vector<float*> pointers = matrix_pointers(problems.cuda, updates);
        apply_update_on_cuda_(group, pointers.data());
      },
      [](const auto& matrices, const auto& given) { aten::apply_update_(matrices, given); });
}

void factor_update_op(const TensorList& grads, const States& states, const py::dict& options) {
  const Options parsed = parse_options(options, device_of(states));
  Inputs inputs = with_grads(grads, states);
  inputs.needs_factors = inputs.needs_dense = true;
  Problems problems(states, inputs, parsed);
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) { cpu::factor_update_<T>(list.matrices, parsed); },
      [](const auto& group) { factor_update_on_cuda_(group); },
      [](const auto& matrices, const auto& given) { aten::factor_update_(matrices, given); });
}

void initialize_op(const TensorList& grads, const States& states, const Offsets& offsets,
                   const py::dict& options) {
  const Options parsed = parse_options(options, device_of(states));
  Inputs inputs = with_grads(grads, states);
  inputs.offsets = offsets;
  inputs.needs_factors = true;
  Problems problems(states, inputs, parsed);
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) { cpu::initialize_<T>(list.matrices, parsed); },
      [](const auto& group) { initialize_on_cuda_(group); },
      [](const auto& matrices, const auto& given) { aten::initialize_(matrices, given); });
}

void refresh_basis_op(const States& states, const std::string& side, const py::dict& options) {
  const Options parsed = parse_options(options, device_of(states));
  if (side != "left" && side != "right") fail("side", "'left' or 'right'", "'" + side + "'");
  const Side which = side == "left" ? Side::kLeft : Side::kRight;
  Problems problems(states, {.needs_matrices = true}, parsed);
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) {
        cpu::refresh_basis_<T>(list.matrices, parsed, which);
      },
      [&](const auto& group) { refresh_basis_on_cuda_(group, which); },
      [&](const auto& matrices, const auto& given) {
        aten::refresh_basis_(matrices, given, which);
      });
}

void refresh_due_op(const States& states, const Offsets& offsets, const py::dict& options,
                    const TensorList& kept, const TensorList& full) {
  const Options parsed = parse_options(options, device_of(states));
  Problems problems(states, {.offsets = offsets}, parsed);
  {
    const py::gil_scoped_release no_gil;
    const Apart apart;
    copy(full, kept);
  }
  run(
      problems, parsed,
      [&]<typename T>(ProblemList<T>& list) { cpu::refresh_due_<T>(list.matrices, parsed); },
      [](const auto& group) { refresh_due_on_cuda_(group); },
      [](const auto& matrices, const auto& given) { aten::refresh_due_(matrices, given); });
  const py::gil_scoped_release no_gil;
  const Apart apart;
  copy(kept, full);
}

// (least, most) capability, precision, form, (least, most) of m, of n and of k, by the library;
// dykaf.products has checked them.
using Range = std::pair<int64_t, int64_t>;
using RuleTuple = std::tuple<Range, std::string, std::string, Range, Range, Range, bool>;

void use_products_op(const std::vector<RuleTuple>& tuples) {
  const auto range = [](const Range& r) { return cuda::SizeRange{r.first, r.second}; };
  std::vector<CapabilityRule> rules;
  for (const auto& [capability, precision, form, m, n, k, by_library] : tuples) {
    rules.push_back(
        {range(capability),
         {.precision = precision == "medium" ? MatmulPrecision::kMedium : MatmulPrecision::kHigh,
          .form = form == "NN"   ? cuda::GemmForm::kNN
                  : form == "TN" ? cuda::GemmForm::kTN
                                 : cuda::GemmForm::kNT,
          .m = range(m),
          .n = range(n),
          .k = range(k),
          .by_library = by_library}});
  }
  use_product_rules(std::move(rules));
}

}  // namespace

void register_ops(py::module_& module) {
  module.def(
      "backend_of",
      [](const at::Tensor& tensor, const std::string& name) {
        return name_of(backend_of(name, tensor));
      },
      py::arg("tensor"), py::arg("name"));
  module.def("use_products", &use_products_op, py::arg("rules"));
  module.def("has_library", &has_library);
  module.def("use_aten_alone", &use_aten_alone, py::arg("alone"));
  module.def("grad_max", &grad_max, py::arg("grads"), py::arg("counts"));
  module.def("rotate", &rotate_op, py::arg("inputs"), py::arg("states"), py::arg("into_basis"),
             py::arg("options"));
  module.def("adam_update_", &adam_update_op, py::arg("grads"), py::arg("states"),
             py::arg("options"));
  module.def("orthogonalize_", &orthogonalize_op, py::arg("updates"), py::arg("states"),
             py::arg("options"));
  module.def("apply_update_", &apply_update_op, py::arg("params"), py::arg("updates"),
             py::arg("states"), py::arg("streams"), py::arg("options"), py::arg("places"));
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
