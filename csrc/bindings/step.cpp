// The whole step of all groups in one call: first everything that may fail, then the changes.
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <list>
#include <memory>
#include <sstream>
#include <tuple>

#include "aten/ops.h"
#include "bindings/on_cuda.h"
#include "bindings/problems.h"
#include "bindings/register.h"
#include "dykaf/ops.h"

namespace dykaf::bindings {
namespace {

// The step of those matrices of a job that one backend serves.
class Part {
 public:
  Part(std::vector<size_t> sources, std::vector<size_t> places)
      : sources(std::move(sources)), places(std::move(places)) {}
  virtual ~Part() = default;

  virtual bool has_fresh() const = 0;
  virtual void initialize_() = 0;
  virtual void reset_() = 0;
  virtual StepReport run_() = 0;
  // What plan() takes.
  virtual int64_t workspace_bytes() const { return 0; }
  virtual void plan(void*) {}

  // Of each matrix: the place of its parameter in the job, and its own.
  const std::vector<size_t> sources;
  const std::vector<size_t> places;
};

// BackendStep is cpu::Step, aten::Step or CudaStep.
template <typename BackendStep>
class PartOf : public Part {
 public:
  PartOf(std::vector<size_t> sources, std::vector<size_t> places, BackendStep step)
      : Part(std::move(sources), std::move(places)), step_(std::move(step)) {}

  bool has_fresh() const override { return step_.has_fresh(); }
  void initialize_() override { step_.initialize_(); }
  void reset_() override { step_.reset_(); }
  StepReport run_() override { return step_.run_(); }
  int64_t workspace_bytes() const override {
    if constexpr (kIsPlanned) return step_.workspace_bytes();
    return 0;
  }
  void plan([[maybe_unused]] void* workspace) override {
    if constexpr (kIsPlanned) step_.plan(workspace);
  }

 private:
  static constexpr bool kIsPlanned = requires(BackendStep step) { step.workspace_bytes(); };

  BackendStep step_;
};

// The step of some parameters of one group on one device; dykaf.ops.StepJob documents the fields.
class Job {
 public:
  explicit Job(const py::object& job)
      : states_(read<std::vector<py::dict>>(job, "states")),
        options_(parse_options(read<py::dict>(job, "options"), device_of(states_))),
        refreshes_(read<bool>(job, "refresh") ? Refreshes::kWithStep : Refreshes::kApart),
        skip_(read<std::optional<at::Tensor>>(job, "skip")),
        amp_scale_(read<std::optional<at::Tensor>>(job, "amp_scale")),
        lr_(read<std::optional<at::Tensor>>(job, "lr")),
        kept_(read<TensorList>(job, "kept")),
        full_(read<TensorList>(job, "full")),
        problems_(states_,
                  {.params = read<TensorList>(job, "params"),
                   .grads = read<TensorList>(job, "grads"),
                   .grad_max = read<at::Tensor>(job, "grad_max"),
                   .streams = read<std::vector<uint64_t>>(job, "streams"),
                   .places = read<std::vector<std::array<uint64_t, 3>>>(job, "places"),
                   .offsets = read<std::vector<std::vector<int64_t>>>(job, "offsets")},
                  options_) {
    check_scalar("skip", skip_, at::kInt);
    check_scalar("amp_scale", amp_scale_, at::kFloat);
    check_scalar("lr", lr_, at::kFloat);
  }

  // Allocates; changes nothing.
  void prepare() {
    add(problems_.single,
        [&](const auto& list) { return cpu::Step<float>(list, options_, refreshes_); });
    add(problems_.wide,
        [&](const auto& list) { return cpu::Step<double>(list, options_, refreshes_); });
    add(problems_.aten, [&](const auto& list) {
      return aten::Step(list, {options_, skip_, amp_scale_, lr_}, refreshes_);
    });
#if defined(DYKAF_WITH_CUDA)
    add(problems_.cuda, [&](const auto& list) {
      return CudaStep({list, options_, device(), options_.precision,
                       problems_.maxima_of(problems_.cuda.places), skip_, amp_scale_, lr_},
                      refreshes_);
    });
#endif
  }

  int64_t workspace_bytes() const {
    int64_t bytes = 0;
    for (const auto& part : parts_) bytes = std::max(bytes, part->workspace_bytes());
    return bytes;
  }
  const at::Device& device() const { return problems_.device(); }
  void plan(void* workspace) {
    for (const auto& part : parts_) part->plan(workspace);
  }

  // Where there is nothing fresh nothing is copied either.
  void initialize_() {
    if (!has_fresh()) return;
    widen();
    for (const auto& part : parts_) part->initialize_();
    narrow();
  }
  void reset_() {
    if (!has_fresh()) return;
    widen();
    for (const auto& part : parts_) part->reset_();
    narrow();
  }

  // By the places of parameters in the job; of those waiting, matrices.
  StepReport run_() {
    StepReport found;
    widen();
    for (const auto& part : parts_) {
      const StepReport report = part->run_();
      for (size_t i : report.failed) found.failed.push_back(part->sources[i]);
      for (size_t i : report.stayed) found.stayed.push_back(part->sources[i]);
      for (size_t i : report.waiting) found.waiting.push_back(part->places[i]);
    }
    narrow();
    problems_.write_back();
    return found;
  }

 private:
  template <typename Value>
  static Value read(const py::object& job, const char* name) {
    return py::cast<Value>(job.attr(name));
  }

  // For what a GPU reads while a step runs.
  void check_scalar(const char* name, const std::optional<at::Tensor>& value,
                    at::ScalarType dtype) const {
    if (!value) return;
    if (!problems_.single.matrices.empty() || !problems_.wide.matrices.empty()) {
      fail(name, "nothing on the CPU", "a tensor");
    }
    if (value->scalar_type() != dtype || value->numel() != 1 || value->device() != device()) {
      std::ostringstream expected;
      expected << dtype << " [1] on " << device();
      fail(name, expected.str(), describe(*value));
    }
  }

  template <typename Matrix, typename MakeStep>
  void add(const MatrixList<Matrix>& list, const MakeStep& make_step) {
    if (list.matrices.empty()) return;
    using BackendStep = decltype(make_step(list.matrices));
    parts_.push_back(
        std::make_unique<PartOf<BackendStep>>(list.sources, list.places, make_step(list.matrices)));
  }

  bool has_fresh() const {
    return std::any_of(parts_.begin(), parts_.end(),
                       [](const auto& part) { return part->has_fresh(); });
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
  std::optional<at::Tensor> skip_;
  std::optional<at::Tensor> amp_scale_;
  std::optional<at::Tensor> lr_;
  TensorList kept_;  // in bfloat16
  TensorList full_;  // memory of their own for them, which other jobs use too
  Problems problems_;
  std::vector<std::unique_ptr<Part>> parts_;
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
    StepReport report = job.run_();
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
