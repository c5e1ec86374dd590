#include "bindings/on_cuda.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "aten/ops.h"
#include "bindings/cuda_products.h"

#if defined(DYKAF_WITH_CUDA)

namespace dykaf::bindings {
namespace {

// The scratch memory of one pass over a group; a group that needs more goes in several passes, each
// with enough work to fill a GPU.
#if defined(DYKAF_SIMT)
constexpr int64_t kMaxWorkspaceBytes = int64_t{1} << 10;  // tests are to see several passes
#else
constexpr int64_t kMaxWorkspaceBytes = int64_t{1} << 29;
#endif

template <typename T>
const T* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

cuda::DeviceInputs inputs_of(const CudaGroup& group) {
  return {.grad_max = pointer<double>(group.grad_max),
          .skip = pointer<int32_t>(group.skip),
          .amp_scale = pointer<float>(group.amp_scale),
          .lr = pointer<float>(group.lr)};
}

cuda::Products products_of(const CudaGroup& group) {
  return products_on(group.device, group.precision);
}

// The matrices `indices` of the group, as a group of their own over `problems`, without maxima.
CudaGroup subgroup(const CudaGroup& group, const std::vector<size_t>& indices,
                   std::vector<Problem<float>>& problems) {
  problems = chosen(group.problems, indices);
  CudaGroup part{problems, group.options, group.device, group.precision};
  part.skip = group.skip;
  part.amp_scale = group.amp_scale;
  part.lr = group.lr;
  return part;
}

// `indices` of the group in passes that keep to kMaxWorkspaceBytes.
std::vector<std::vector<size_t>> passes_of(const CudaGroup& group,
                                           const std::vector<size_t>& indices) {
  std::vector<std::vector<size_t>> passes;
  for (size_t begin = 0; begin < indices.size();) {
    int64_t bytes = 0;
    size_t end = begin;
    while (end < indices.size()) {
      bytes += cuda::step_workspace_bytes(group.problems[indices[end]], group.options);
      if (end > begin && bytes > kMaxWorkspaceBytes) break;
      ++end;
    }
    passes.emplace_back(indices.begin() + begin, indices.begin() + end);
    begin = end;
  }
  return passes;
}

// Rows that a skipped step did not write weigh nothing: their part of `core` is zero.
void count_rows(const CudaGroup& group, const std::vector<size_t>& indices) {
  for (size_t i : indices) {
    const Problem<float>& p = group.problems[i];
    if (p.is_skinny()) p.rows[1] += p.short_side();
  }
}

}  // namespace

at::Tensor grad_max_on_cuda(std::span<const Gradient> gradients, const at::Device& device) {
  const at::Tensor maxima = at::empty({static_cast<int64_t>(gradients.size())},
                                      at::TensorOptions().dtype(at::kDouble).device(device));
  run_plan(device, [&](void* workspace) {
    return cuda::plan_grad_max(gradients, maxima.mutable_data_ptr<double>(), workspace);
  });
  return maxima;
}

void rotate_on_cuda(const CudaGroup& group, Rotation rotation, const float* const* inputs,
                    float* const* outputs) {
  const cuda::Products products = products_of(group);
  run_plan(group.device, [&](void* workspace) {
    return cuda::plan_rotate(group.problems, rotation, inputs, outputs, products, workspace);
  });
}

void adam_update_on_cuda_(const CudaGroup& group, float* const* updates) {
  run_plan(group.device, [&](void* workspace) {
    return cuda::plan_adam_update(group.problems, group.options, inputs_of(group), updates,
                                  workspace);
  });
}

void orthogonalize_on_cuda_(const CudaGroup& group, float* const* updates) {
  const cuda::Products products = products_of(group);
  run_plan(group.device, [&](void* workspace) {
    return cuda::plan_orthogonalize(group.problems, group.options, inputs_of(group), products,
                                    updates, workspace);
  });
}

void apply_update_on_cuda_(const CudaGroup& group, const float* const* updates) {
  run_plan(group.device, [&](void* workspace) {
    return cuda::plan_apply_update(group.problems, group.options, inputs_of(group), updates,
                                   workspace);
  });
}

void factor_update_on_cuda_(const CudaGroup& group) {
  const cuda::Products products = products_of(group);
  run_plan(group.device, [&](void* workspace) {
    return cuda::plan_factor_update(group.problems, group.options, inputs_of(group), products,
                                    workspace);
  });
}

namespace {

aten::Inputs aten_inputs(const CudaGroup& group) {
  return {group.options, group.skip, group.amp_scale, group.lr};
}

aten::Matrices matrices_of(std::span<const Problem<float>> problems, const CudaGroup& group) {
  aten::Matrices matrices;
  for (const Problem<float>& p : problems) matrices.emplace_back(p, group.device);
  return matrices;
}

}  // namespace

void initialize_on_cuda_(const CudaGroup& group) {
  aten::Matrices matrices = matrices_of(group.problems, group);
  for (size_t i = 0; i < matrices.size(); ++i) {
    matrices[i].grad_max = group.grad_max->select(0, static_cast<int64_t>(i));
  }
  aten::initialize_(matrices, aten_inputs(group));
}

void reset_on_cuda_(const CudaGroup& group, const Problem<float>& p) {
  const c10::DeviceGuard guard(group.device);
  aten::reset_(aten::Matrix(p, group.device));
}

void refresh_basis_on_cuda_(const CudaGroup& group, Side side) {
  aten::refresh_basis_(matrices_of(group.problems, group), aten_inputs(group), side);
}

std::vector<size_t> refresh_due_on_cuda_(const CudaGroup& group) {
  const auto due = take_due(group.problems, group.options);
  std::vector<size_t> failures;
  for (const Side side : {Side::kLeft, Side::kRight}) {
    const std::vector<size_t>& places = due[static_cast<size_t>(side)];
    const aten::Matrices matrices = matrices_of(chosen(group.problems, places), group);
    for (const size_t i : aten::refresh_basis_(matrices, aten_inputs(group), side)) {
      failures.push_back(places[i]);
    }
  }
  return failures;
}

CudaStep::CudaStep(const CudaGroup& group, Refreshes refreshes, CudaPasses& passes)
    : group_(group),
      refreshes_(refreshes),
      products_(products_of(group)),
      places_(group.problems),
      kept_(passes) {
  const c10::DeviceGuard guard(group.device);
  if (!kept_serves()) {
    kept_ = {};
    kept_.products = products_;
    for (std::vector<size_t>& indices : passes_of(group, places_.running)) {
      kept_.passes.emplace_back().indices = std::move(indices);
    }
  }
  for (CudaPasses::Pass& pass : kept_.passes) {
    if (pass.problems.empty()) pass.problems = chosen(group.problems, pass.indices);
    for (size_t k = 0; k < pass.indices.size(); ++k) {
      pass.problems[k].grad = group.problems[pass.indices[k]].grad;
      pass.problems[k].rate = group.problems[pass.indices[k]].rate;
    }
    pass.grad_max = entries(*group.grad_max, pass.indices);
    if (kept_.workspace != nullptr) continue;
    const CudaGroup part = group_of(pass);
    const cuda::Plan plan =
        cuda::plan_step(part.problems, part.options, inputs_of(part), products_, nullptr);
    kept_.workspace_bytes = std::max(kept_.workspace_bytes, plan.workspace_bytes);
  }
}

bool CudaStep::kept_serves() const {
  if (kept_.workspace == nullptr || !(kept_.products == products_)) return false;
  size_t num_matrices = 0;
  for (const CudaPasses::Pass& pass : kept_.passes) {
    num_matrices += pass.indices.size();
    // Where its gradients go, and how much is done with them, differs from step to step.
    const auto is_skinny = [](const auto& p) { return p.is_skinny(); };
    if (std::any_of(pass.problems.begin(), pass.problems.end(), is_skinny)) return false;
    if (!cuda::serves(pass.plan, group_.options)) return false;
  }
  // Of all matrices, then and now.
  return num_matrices == group_.problems.size() && places_.running.size() == num_matrices;
}

CudaGroup CudaStep::group_of(const CudaPasses::Pass& pass) const {
  CudaGroup part = group_;
  part.problems = pass.problems;
  part.grad_max = pass.grad_max;
  return part;
}

void CudaStep::plan(void* workspace) {
  const c10::DeviceGuard guard(group_.device);
  const bool is_there = kept_.workspace == workspace;
  for (CudaPasses::Pass& pass : kept_.passes) {
    const CudaGroup part = group_of(pass);
    const cuda::DeviceInputs inputs = inputs_of(part);
    if (is_there) {
      cuda::renew_step(pass.plan, part.problems, part.options, inputs);
    } else {
      pass.plan = cuda::plan_step(part.problems, part.options, inputs, products_, workspace);
    }
    pass.image = copy_to_device(pass.plan.image, group_.device);
  }
  kept_.workspace = workspace;
}

void CudaStep::initialize_() {
  std::vector<Problem<float>> problems;
  for (const std::vector<size_t>& indices : passes_of(group_, places_.fresh)) {
    CudaGroup part = subgroup(group_, indices, problems);
    part.grad_max = entries(*group_.grad_max, indices);
    initialize_on_cuda_(part);
  }
}

void CudaStep::reset_() {
  for (size_t i : places_.fresh) reset_on_cuda_(group_, group_.problems[i]);
}

StepReport CudaStep::run_() {
  const c10::DeviceGuard guard(group_.device);
  for (CudaPasses::Pass& pass : kept_.passes) {
    launch_plan(pass.plan, pass.image);
    pass.grad_max.reset();
    pass.image.reset();
  }
  StepReport report;
  report.waiting = places_.still_waiting(group_.problems);
  if (refreshes_ == Refreshes::kApart) return report;
  count_rows(group_, places_.running);
  std::vector<Problem<float>> problems;
  const bool all_run = places_.running.size() == group_.problems.size();
  const CudaGroup running = all_run ? group_ : subgroup(group_, places_.running, problems);
  for (size_t i : refresh_due_on_cuda_(running)) {
    report.stayed.push_back(places_.running[i]);
  }
  return report;
}

}  // namespace dykaf::bindings

#endif
