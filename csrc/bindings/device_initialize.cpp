// The first gradient of matrices on a device: csrc/cpu/initialize.cpp has the mathematics. It waits
// for the device, once per matrix in a training run.
#include <ATen/Context.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/tensor.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cmath>

#include "bindings/device_ops.h"
#include "cpu/first_basis.h"
#include "cpu/linalg.h"
#include "cpu/skinny.h"
#include "dykaf/prior.h"
#include "dykaf/schedule.h"

#if defined(DYKAF_WITH_CUDA)

namespace dykaf::bindings {
namespace {

// One matrix, as tensors.
class FirstGradient {
 public:
  FirstGradient(const DeviceGroup& group, const Problem<float>& p, double grad_max,
                double grad_scale)
      : group_(group), p_(p) {
    int exponent = 0;
    if (std::isfinite(grad_max)) std::frexp(grad_max, &exponent);
    const double unit = std::ldexp(1.0, exponent);
    tau_ = unit * std::fabs(grad_scale);
    const auto dtype = p.dtype == DType::kFloat32    ? at::kFloat
                       : p.dtype == DType::kBFloat16 ? at::kBFloat16
                                                     : at::kHalf;
    const auto options = at::TensorOptions().dtype(dtype).device(group.device);
    H_ = at::from_blob(const_cast<void*>(p.grad), {p.m, p.n}, options).to(at::kDouble);
    H_ = H_.div_(std::copysign(unit, grad_scale)).to(at::kFloat);
  }

  void set_prior_() {
    const bool two_sided = p_.L != nullptr && p_.R != nullptr;
    if (group_.options.init == Init::kRankOne && two_sided && set_rank_one_prior_()) return;
    if (p_.L != nullptr) set_scaled_identity_(p_.L, p_.m);
    if (p_.R != nullptr) set_scaled_identity_(p_.R, p_.n);
    const double norm = tau_ * H_.to(at::kDouble).norm().item<double>();
    const auto rho = prior_rho(group_.options, p_.m, p_.n, two_sided, norm);
    set_rho(rho[0], rho[1]);
  }

  // All there is to do for a skinny matrix.
  void initialize_skinny_() {
    const cpu::SkinnyMatrix w(p_, group_.device);
    const cpu::SkinnyStart start = cpu::initialize_skinny_(w, group_.options, w.oriented(H_), tau_);
    set_rho(start.rho[0], start.rho[1]);
    count_fallbacks(start.fallbacks);
  }

  void first_basis_(Side side) {
    const bool left = side == Side::kLeft;
    if ((left ? p_.L : p_.R) == nullptr) return;
    const int64_t n = left ? p_.m : p_.n;
    at::Tensor F = device_view(left ? p_.L : p_.R, {n, n}, group_.device);
    at::Tensor Q = device_view(left ? p_.Q_L : p_.Q_R, {n, n}, group_.device);
    // With init "rank_one" the splitting integrators keep the factors at rank one.
    const bool rank_one = group_.options.init == Init::kRankOne && p_.L != nullptr &&
                          p_.R != nullptr && group_.options.integrator != Integrator::kDiagonal;
    const auto vectors =
        rank_one ? cpu::rank_one_vector(F) : cpu::leading_eigenvectors(F, left ? H_ : H_.t());
    const auto basis = vectors ? cpu::complete_basis(*vectors) : std::nullopt;
    if (!basis) {
      Q.copy_(at::eye(n, Q.options()));
      count_fallbacks(1);
      return;
    }
    Q.copy_(*basis);
    const at::Tensor lower = cpu::full_product(Q.t(), cpu::full_product(F, Q)).tril();
    F.copy_(lower.add(lower.tril(-1).t()));
  }

  void set_dates_() {
    for (const Side side : {Side::kLeft, Side::kRight}) {
      const auto i = static_cast<size_t>(side);
      p_.next_refresh[i] = next_refresh(0, group_.options, p_.refresh_offset[i]);
    }
  }

 private:
  void set_scaled_identity_(float* factor, int64_t n) {
    at::Tensor F = device_view(factor, {n, n}, group_.device);
    F.copy_(at::eye(n, F.options()).div_(std::sqrt(static_cast<double>(n))));
  }

  bool set_rank_one_prior_() {
    const auto top = cpu::top_singular_triple(H_);
    if (!top) return false;
    device_view(p_.L, {p_.m, p_.m}, group_.device).copy_(at::outer(top->u, top->u));
    device_view(p_.R, {p_.n, p_.n}, group_.device).copy_(at::outer(top->v, top->v));
    const auto rho = rank_one_rho(group_.options, p_.m, p_.n, tau_ * top->sigma);
    set_rho(rho[0], rho[1]);
    return true;
  }

  void count_fallbacks(int64_t num) {
    const auto options = at::TensorOptions().dtype(at::kLong).device(group_.device);
    at::from_blob(p_.refresh_fallbacks, {1}, options).add_(num);
  }

  void set_rho(double left, double right) {
    const auto options = at::TensorOptions().dtype(at::kDouble).device(group_.device);
    at::Tensor rho = at::from_blob(p_.rho, {2}, options);
    rho[0].fill_(left);
    rho[1].fill_(right);
  }

  const DeviceGroup& group_;
  const Problem<float>& p_;
  double tau_;    // grad_scale gradient = tau H
  at::Tensor H_;  // [m, n], the gradient over a power of two of its size
};

void initialize_(const DeviceGroup& group) {
  if (group.skip && group.skip->item<int32_t>() != 0) return;
  const double amp_scale = group.amp_scale ? group.amp_scale->item<double>() : 1.0;
  const at::Tensor maxima = group.grad_max->to(at::kCPU);

  std::vector<Problem<float>> problems;
  std::vector<FirstGradient> gradients;
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < maxima.numel(); ++i) {
    const double grad_max = maxima.const_data_ptr<double>()[i];
    const Problem<float>& p = group.problems[static_cast<size_t>(i)];
    if (grad_max == 0) {
      std::fill_n(p.next_refresh, 2, kSawZero);
      continue;
    }
    FirstGradient gradient(group, p, grad_max, group.options.grad_scale / amp_scale);
    if (p.is_skinny()) {
      gradient.initialize_skinny_();
      gradient.set_dates_();
      continue;
    }
    gradient.set_prior_();
    indices.push_back(i);
    problems.push_back(p);
    gradients.push_back(gradient);
  }
  if (indices.empty()) return;
  DeviceGroup started{problems, group.options, group.device, MatmulPrecision::kHighest};
  started.amp_scale = group.amp_scale;
  started.grad_max = group.grad_max->index_select(0, at::tensor(indices).to(group.device));
  factor_update_on_device_(started);

  for (FirstGradient& gradient : gradients) {
    for (const Side side : {Side::kLeft, Side::kRight}) gradient.first_basis_(side);
    gradient.set_dates_();
  }
}

}  // namespace

void initialize_on_device_(const DeviceGroup& group) {
  const c10::DeviceGuard guard(group.device);
  const at::NoTF32Guard full_precision;
  try {
    initialize_(group);
  } catch (...) {
    for (const Problem<float>& p : group.problems) reset_on_device_(group, p);
    throw;
  }
}

void reset_on_device_(const DeviceGroup& group, const Problem<float>& p) {
  const c10::DeviceGuard guard(group.device);
  const auto clear = [&](auto* data, int64_t size) {
    using Entry = std::remove_pointer_t<decltype(data)>;
    if (data == nullptr) return;
    const auto options = at::TensorOptions().device(group.device);
    at::from_blob(data, {size}, options.dtype(c10::CppTypeToScalarType<Entry>::value)).zero_();
  };
  for (float* factor : {p.L, p.Q_L}) clear(factor, p.m * p.m);
  for (float* factor : {p.R, p.Q_R}) clear(factor, p.n * p.n);
  clear(p.basis, 2 * p.skinny_rank * p.long_side());
  clear(p.core, 4 * p.skinny_rank * p.skinny_rank);
  clear(p.flat, 1);
  clear(p.rho, 2);
  clear(p.refresh_fallbacks, 1);
  std::fill_n(p.next_refresh, 2, 0);
  if (p.rows != nullptr) std::fill_n(p.rows, 2, 0);
}

}  // namespace dykaf::bindings

#endif
