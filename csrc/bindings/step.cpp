// The whole step of all groups in one call: first everything that may fail, then the changes.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <list>
#include <optional>
#include <tuple>

#include "bindings/job.h"
#include "bindings/register.h"
#include "bindings/seen.h"

namespace dykaf::bindings {
namespace {

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
using Report = std::tuple<Places, Places, Places>;

Report step_(std::list<Job>& jobs, at::Tensor started) {
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

// The jobs of a step, and of those after it while they find all as it was; dykaf.ops.Jobs documents
// the methods.
class Jobs {
 public:
  explicit Jobs(const std::vector<py::object>& descriptions) {
    for (const py::object& job : descriptions) jobs_.emplace_back(job);
  }

  Report run(const at::Tensor& started) { return step_(jobs_, started); }

  bool keep(const py::list& groups, const py::dict& states, Places places) {
    bool is_kept = true;
    for (Job& job : jobs_) is_kept = job.keep() && is_kept;
    if (!is_kept) return false;
    seen_.emplace(groups, states);
    places_ = std::move(places);
    return seen_->is_plain();
  }

  std::optional<TensorList> grad_max(const py::list& groups, const py::dict& states) {
    let_go();
    // Addresses may be read once it is known that they hold.
    const auto needs_a_look = [](const Job& job) { return job.problems().needs_a_look(); };
    if (!seen_->again(groups, states, params_, grads_) ||
        std::any_of(jobs_.begin(), jobs_.end(), needs_a_look)) {
      let_go();
      return std::nullopt;
    }
    const Apart apart;
    size_t i = 0;
    for (const Job& job : jobs_) {
      maxima_.push_back(job.problems().grad_max_of(entries_of(grads_, places_[i++])));
    }
    return maxima_;
  }

  Report run_again(const std::vector<py::object>& inputs, const at::Tensor& started) {
    size_t i = 0;
    for (Job& job : jobs_) {
      job.renew(entries_of(params_, places_[i]), entries_of(grads_, places_[i]), maxima_[i],
                inputs[i]);
      ++i;
    }
    let_go();
    const Report report = step_(jobs_, started);
    for (Job& job : jobs_) job.keep();
    return report;
  }

  void let_go() {
    params_.clear();
    grads_.clear();
    maxima_.clear();
  }

 private:
  static TensorList entries_of(const TensorList& all, const std::vector<size_t>& places) {
    TensorList some;
    for (size_t i : places) some.push_back(all[i]);
    return some;
  }

  std::list<Job> jobs_;
  std::optional<Seen> seen_;
  Places places_;  // of each job's parameters among all
  // From grad_max() to run_again().
  TensorList params_;
  TensorList grads_;
  TensorList maxima_;
};

}  // namespace

void register_step(py::module_& module) {
  py::class_<Jobs>(module, "Jobs")
      .def(py::init<const std::vector<py::object>&>(), py::arg("jobs"))
      .def("run", &Jobs::run, py::arg("started"))
      .def("keep", &Jobs::keep, py::arg("groups"), py::arg("states"), py::arg("places"))
      .def("grad_max", &Jobs::grad_max, py::arg("groups"), py::arg("states"))
      .def("let_go", &Jobs::let_go)
      .def("run_again", &Jobs::run_again, py::arg("inputs"), py::arg("started"));
}

}  // namespace dykaf::bindings
