// The step of some parameters of one group on one device; dykaf.ops.StepJob documents the fields.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "bindings/on_cuda.h"
#include "bindings/problems.h"
#include "dykaf/ops.h"

namespace dykaf::bindings {

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

// What a device reads while a step runs, and whether the step refreshes bases.
struct StepInputs {
  StepInputs() = default;
  explicit StepInputs(const py::object& job);

  Refreshes refreshes = Refreshes::kWithStep;
  std::optional<at::Tensor> skip;
  std::optional<at::Tensor> amp_scale;
  std::optional<at::Tensor> lr;
};

class Job {
 public:
  explicit Job(const py::object& job);

  // Lets go of every tensor. What is left are addresses, for the next step of parameters and state
  // that Seen finds as they were; false where that takes more.
  bool keep();
  void renew(const TensorList& params, const TensorList& grads, const at::Tensor& grad_max,
             const py::object& inputs);
  const Problems& problems() const { return problems_; }

  // Allocates; changes nothing.
  void prepare();
  int64_t workspace_bytes() const;
  const at::Device& device() const { return problems_.device(); }
  void plan(void* workspace);

  // Where there is nothing fresh nothing is copied either.
  void initialize_();
  void reset_();

  // By the places of parameters in the job; of those waiting, matrices.
  StepReport run_();

 private:
  void check_inputs() const;
  void check_scalar(const char* name, const std::optional<at::Tensor>& value,
                    at::ScalarType dtype) const;
  template <typename Matrix, typename MakeStep>
  void add(const MatrixList<Matrix>& list, const MakeStep& make_step);
  bool has_fresh() const;
  void widen();
  void narrow();

  Options options_;
  StepInputs inputs_;
  TensorList kept_;  // in bfloat16
  TensorList full_;  // memory of their own for them, which other jobs use too
  Problems problems_;
  CudaPasses cuda_passes_;
  std::vector<std::unique_ptr<Part>> parts_;
};

}  // namespace dykaf::bindings
