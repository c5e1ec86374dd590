// The whole step of all groups in one call: first everything that may fail, then the changes.
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty.h>

#include <list>
#include <sstream>
#include <tuple>

#include "bindings/device_ops.h"
#include "bindings/problems.h"
#include "bindings/register.h"
#include "dykaf/ops.h"

namespace dykaf::bindings {
namespace {

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

// The step of some parameters of one group on one device; dykaf.ops.StepJob documents the fields.
class Job {
 public:
  explicit Job(const py::object& job)
      : states_(read<std::vector<py::dict>>(job, "states")),
        options_(parse_options(read<py::dict>(job, "options"), backend_of(states_))),
        refreshes_(read<bool>(job, "refresh") ? Refreshes::kWithStep : Refreshes::kApart),
        grad_max_(read<at::Tensor>(job, "grad_max")),
        skip_(read<std::optional<at::Tensor>>(job, "skip")),
        amp_scale_(read<std::optional<at::Tensor>>(job, "amp_scale")),
        lr_(read<std::optional<at::Tensor>>(job, "lr")),
        kept_(read<TensorList>(job, "kept")),
        full_(read<TensorList>(job, "full")),
        problems_(states_,
                  {.params = read<TensorList>(job, "params"),
                   .grads = read<TensorList>(job, "grads"),
                   .grad_max = grad_max_,
                   .streams = read<std::vector<uint64_t>>(job, "streams"),
                   .offsets = read<std::vector<std::vector<int64_t>>>(job, "offsets")},
                  options_.second_moment) {
    check_scalar("skip", skip_, at::kInt, problems_);
    check_scalar("amp_scale", amp_scale_, at::kFloat, problems_);
    check_scalar("lr", lr_, at::kFloat, problems_);
  }

  // Allocates; changes nothing.
  void prepare() {
    if (problems_.backend() == Backend::kCpu) {
      single_.emplace(problems_.single.problems, options_, refreshes_);
      wide_.emplace(problems_.wide.problems, options_, refreshes_);
      return;
    }
#if defined(DYKAF_WITH_CUDA)
    device_.emplace(DeviceGroup{problems_.single.problems, options_, problems_.device(),
                                options_.precision, grad_max_, skip_, amp_scale_, lr_},
                    refreshes_);
#endif
  }

  int64_t workspace_bytes() const {
#if defined(DYKAF_WITH_CUDA)
    if (device_) return device_->workspace_bytes();
#endif
    return 0;
  }
  const at::Device& device() const { return problems_.device(); }
  void plan([[maybe_unused]] void* workspace) {
#if defined(DYKAF_WITH_CUDA)
    if (device_) device_->plan(workspace);
#endif
  }

  // Where there is nothing fresh nothing is copied either.
  void initialize_() {
    if (!has_fresh()) return;
    for_each_in_full_([](auto& step) { step.initialize_(); });
  }
  void reset_() {
    if (!has_fresh()) return;
    for_each_in_full_([](auto& step) { step.reset_(); });
  }

  // By the places of parameters in the job; of those waiting, matrices.
  cpu::StepReport run_() {
    cpu::StepReport found;
    const auto add = [&](const cpu::StepReport& report, const std::vector<size_t>& sources) {
      for (size_t i : report.failed) found.failed.push_back(sources[i]);
      for (size_t i : report.stayed) found.stayed.push_back(sources[i]);
      for (size_t i : report.waiting) found.waiting.push_back(i);
    };
    widen();
    if (single_) add(single_->run_(), problems_.single.sources);
    if (wide_) add(wide_->run_(), problems_.wide.sources);
#if defined(DYKAF_WITH_CUDA)
    if (device_) add(device_->run_(), problems_.single.sources);
#endif
    narrow();
    problems_.write_back();
    return found;
  }

 private:
  template <typename Value>
  static Value read(const py::object& job, const char* name) {
    return py::cast<Value>(job.attr(name));
  }

  bool has_fresh() const {
#if defined(DYKAF_WITH_CUDA)
    if (device_) return device_->has_fresh();
#endif
    return single_->has_fresh() || wide_->has_fresh();
  }

  template <typename Body>
  void for_each_in_full_(const Body& body) {
    widen();
    if (single_) body(*single_);
    if (wide_) body(*wide_);
#if defined(DYKAF_WITH_CUDA)
    if (device_) body(*device_);
#endif
    narrow();
  }

  void widen() {
    if (!kept_.empty()) at::_foreach_copy_(full_, kept_);
  }
  void narrow() {
    if (!kept_.empty()) at::_foreach_copy_(kept_, full_);
  }

  std::vector<py::dict> states_;
  Options options_;
  Refreshes refreshes_;
  at::Tensor grad_max_;
  std::optional<at::Tensor> skip_;
  std::optional<at::Tensor> amp_scale_;
  std::optional<at::Tensor> lr_;
  TensorList kept_;  // in bfloat16
  TensorList full_;  // memory of their own for them, which other jobs use too
  Problems problems_;
  std::optional<cpu::Step<float>> single_;
  std::optional<cpu::Step<double>> wide_;
#if defined(DYKAF_WITH_CUDA)
  std::optional<DeviceStep> device_;
#endif
};

// Everything that allocates: workspaces, which the jobs of a device share, and plans.
std::vector<at::Tensor> prepare(std::list<Job>& jobs) {
  std::vector<at::Tensor> workspaces;
  for (Job& job : jobs) job.prepare();
  for (Job& job : jobs) {
    if (job.workspace_bytes() == 0) continue;
    at::Tensor* workspace = nullptr;
    for (at::Tensor& other : workspaces) {
      if (other.device() == job.device()) workspace = &other;
    }
    if (workspace == nullptr) {
      int64_t bytes = 0;
      for (const Job& other : jobs) {
        if (other.device() == job.device()) bytes = std::max(bytes, other.workspace_bytes());
      }
      const auto options = at::TensorOptions().dtype(at::kByte).device(job.device());
      workspace = &workspaces.emplace_back(at::empty({bytes}, options));
    }
    job.plan(workspace->mutable_data_ptr());
  }
  return workspaces;
}

void initialize_(std::list<Job>& jobs) {
  try {
    for (Job& job : jobs) job.initialize_();
  } catch (...) {
    for (Job& job : jobs) job.reset_();
    throw;
  }
}

using Places = std::vector<std::vector<size_t>>;

// Sets started[0] to 1 before the first change that stays.
std::tuple<Places, Places, Places> step_op(const std::vector<py::object>& descriptions,
                                           at::Tensor started) {
  std::list<Job> jobs;
  for (const py::object& job : descriptions) jobs.emplace_back(job);
  const py::gil_scoped_release no_gil;
  const Apart apart;
  const std::vector<at::Tensor> workspaces = prepare(jobs);
  initialize_(jobs);
  started.fill_(1);
  Places failed;
  Places stayed;
  Places waiting;
  for (Job& job : jobs) {
    cpu::StepReport report = job.run_();
    failed.push_back(std::move(report.failed));
    stayed.push_back(std::move(report.stayed));
    waiting.push_back(std::move(report.waiting));
  }
  return {failed, stayed, waiting};
}

}  // namespace

void register_step(py::module_& module) {
  module.def("step_", &step_op, py::arg("jobs"), py::arg("started"));
}

}  // namespace dykaf::bindings
