#include "bindings/job.h"

#include <ATen/ops/_foreach_copy.h>

#include <algorithm>
#include <sstream>
#include <tuple>

#include "aten/ops.h"
#include "bindings/on_cuda.h"
#include "dykaf/schedule.h"

namespace dykaf::bindings {
namespace {

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

template <typename Value>
Value read(const py::object& job, const char* name) {
  return py::cast<Value>(job.attr(name));
}

// One for each parameter: dykaf.ops.StepInputs has those of runs of them, or the options' for all.
std::vector<Rate> rates_of(const py::object& job, size_t num_params) {
  const auto runs = read<std::vector<std::tuple<size_t, double, double>>>(job, "rates");
  if (runs.empty()) {
    return std::vector<Rate>(num_params, parse_rate(read<py::dict>(job, "options")));
  }
  std::vector<Rate> rates;
  for (const auto& [count, lr, weight_decay] : runs) {
    rates.insert(rates.end(), count, {.lr = lr, .weight_decay = weight_decay});
  }
  if (rates.size() != num_params) {
    fail("rates", std::to_string(num_params) + " parameters", std::to_string(rates.size()));
  }
  return rates;
}

std::vector<py::dict> states_of(const py::object& job) {
  return read<std::vector<py::dict>>(job, "states");
}

}  // namespace

StepInputs::StepInputs(const py::object& job)
    : refreshes(read<bool>(job, "refresh") ? Refreshes::kWithStep : Refreshes::kApart),
      skip(read<std::optional<at::Tensor>>(job, "skip")),
      amp_scale(read<std::optional<at::Tensor>>(job, "amp_scale")),
      lr(read<std::optional<at::Tensor>>(job, "lr")) {}

Job::Job(const py::object& job)
    : options_(parse_options(read<py::dict>(job, "options"), device_of(states_of(job)))),
      inputs_(job),
      kept_(read<TensorList>(job, "kept")),
      full_(read<TensorList>(job, "full")),
      problems_(states_of(job),
                {.params = read<TensorList>(job, "params"),
                 .grads = read<TensorList>(job, "grads"),
                 .grad_max = read<at::Tensor>(job, "grad_max"),
                 .streams = read<std::vector<uint64_t>>(job, "streams"),
                 .rates = rates_of(job, states_of(job).size()),
                 .places = read<std::vector<std::array<uint64_t, 3>>>(job, "places"),
                 .offsets = read<std::vector<std::vector<int64_t>>>(job, "offsets")},
                options_) {
  check_inputs();
}

bool Job::keep() {
  parts_.clear();
  inputs_ = {};
  return kept_.empty() && problems_.keep();
}

void Job::renew(const TensorList& params, const TensorList& grads, const at::Tensor& grad_max,
                const py::object& inputs) {
  parts_.clear();
  options_ = parse_options(read<py::dict>(inputs, "options"), device());
  inputs_ = StepInputs(inputs);
  problems_.renew(params, grads, grad_max, rates_of(inputs, params.size()));
  check_inputs();
}

void Job::check_inputs() const {
  check_scalar("skip", inputs_.skip, at::kInt);
  check_scalar("amp_scale", inputs_.amp_scale, at::kFloat);
  check_scalar("lr", inputs_.lr, at::kFloat);
}

void Job::prepare() {
  add(problems_.single,
      [&](const auto& list) { return cpu::Step<float>(list, options_, inputs_.refreshes); });
  add(problems_.wide,
      [&](const auto& list) { return cpu::Step<double>(list, options_, inputs_.refreshes); });
  add(problems_.aten, [&](const auto& list) {
    return aten::Step(list, {options_, inputs_.skip, inputs_.amp_scale, inputs_.lr},
                      inputs_.refreshes);
  });
#if defined(DYKAF_WITH_CUDA)
  add(problems_.cuda, [&](const auto& list) {
    return CudaStep(
        {list, options_, device(), options_.precision, problems_.maxima_of(problems_.cuda.places),
         inputs_.skip, inputs_.amp_scale, inputs_.lr},
        inputs_.refreshes, cuda_passes_);
  });
#endif
}

int64_t Job::workspace_bytes() const {
  int64_t bytes = 0;
  for (const auto& part : parts_) bytes = std::max(bytes, part->workspace_bytes());
  return bytes;
}

void Job::plan(void* workspace) {
  for (const auto& part : parts_) part->plan(workspace);
}

void Job::initialize_() {
  if (!has_fresh()) return;
  widen();
  for (const auto& part : parts_) part->initialize_();
  narrow();
}

void Job::reset_() {
  if (!has_fresh()) return;
  widen();
  for (const auto& part : parts_) part->reset_();
  narrow();
}

StepReport Job::run_() {
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

// For what a GPU reads while a step runs.
void Job::check_scalar(const char* name, const std::optional<at::Tensor>& value,
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
void Job::add(const MatrixList<Matrix>& list, const MakeStep& make_step) {
  if (list.matrices.empty()) return;
  using BackendStep = decltype(make_step(list.matrices));
  parts_.push_back(
      std::make_unique<PartOf<BackendStep>>(list.sources, list.places, make_step(list.matrices)));
}

bool Job::has_fresh() const {
  return std::any_of(parts_.begin(), parts_.end(),
                     [](const auto& part) { return part->has_fresh(); });
}

void Job::widen() {
  if (!kept_.empty()) at::_foreach_copy_(full_, kept_);
}
void Job::narrow() {
  if (!kept_.empty()) at::_foreach_copy_(kept_, full_);
}

}  // namespace dykaf::bindings
