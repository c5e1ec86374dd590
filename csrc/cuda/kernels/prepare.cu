// The scalars of each matrix's step.
#include "cuda/kernels/device/platform.cuh"
#include "cuda/kernels/prepare.h"
#include "dykaf/bounds.h"
#include "dykaf/rounding.h"

namespace dykaf::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxExponent = 125;  // 2^125 and 2^-125 are normal, and 4 * 2^125 is finite

// The least power of two >= `largest`, within limits; 1 for zero and NaN.
__device__ float power_of_two(double largest) {
  if (!(largest > 0)) return 1.0f;
  int exponent = 0;
  const double fraction = frexp(largest, &exponent);  // largest = fraction 2^exponent
  if (fraction == 0.5) exponent -= 1;
  exponent = max(-kMaxExponent, min(kMaxExponent, exponent));
  return static_cast<float>(ldexp(1.0, exponent));
}

// One thread per matrix.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ Group group, const __grid_constant__ Options options,
                   const __grid_constant__ DeviceInputs inputs, StepCount step_count) {
  const int idx = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (idx >= group.num) return;
  const MatrixOnDevice& p = group.matrices[idx];
  MatrixScalars s{};
  s.active = inputs.skip == nullptr || *inputs.skip == 0 ? 1 : 0;
  if (s.active != 0 && step_count == StepCount::kAdvance) *p.step += 1.0f;

  double scale = options.grad_scale;
  if (inputs.amp_scale != nullptr) scale /= static_cast<double>(*inputs.amp_scale);
  const double grad_max = inputs.grad_max == nullptr ? 0.0 : inputs.grad_max[idx];
  double largest = grad_max * fabs(scale);
  // A NaN stays: no comparison with it holds.
  for (int side = 0; side < 2 && p.rho != nullptr; ++side) {
    largest = largest < p.rho[side] ? p.rho[side] : largest;
  }
  s.tau = p.rho == nullptr ? 1.0f : power_of_two(largest);
  s.load_scale = static_cast<float>(scale / static_cast<double>(s.tau));
  s.zero_gradient = grad_max == 0.0 ? 1 : 0;
  s.adam_tau = fminf(s.tau, static_cast<float>(largest_adam_tau<float>(p.m, p.n)));
  s.noise = static_cast<float>(grad_max * fabs(scale) / static_cast<double>(s.tau) *
                               rounding_share<float>(p.rotated_side));

  const double step = static_cast<double>(*p.step);
  const bool is_nesterov = options.nesterov && p.rho != nullptr;
  const double correction1 = 1 / (1 - pow(options.beta1, step));
  s.of_momentum = static_cast<float>(is_nesterov ? options.beta1 * correction1 : correction1);
  s.of_gradient = is_nesterov ? static_cast<float>(1 - options.beta1) : 0.0f;
  s.correction2 = static_cast<float>(1 / sqrt(1 - pow(options.beta2, step)));
  s.update_bound = static_cast<float>(update_bound(options, step));

  const double lr = inputs.lr == nullptr ? p.rate.lr : static_cast<double>(*inputs.lr);
  s.keep = static_cast<float>(1 - lr * p.rate.weight_decay);
  s.lr = static_cast<float>(lr);
  s.rounding_key = rounding_key(options.seed, p.stream, static_cast<uint64_t>(*p.step));
  group.scalars[idx] = s;
}

}  // namespace

int launch_prepare(const Group& group, const Options& options, const DeviceInputs& inputs,
                   StepCount step_count, Stream stream) {
  const auto grid = static_cast<unsigned>(ceil_div(group.num, kThreads));
  return DYKAF_LAUNCH(prepare_kernel, dim3(grid), dim3(kThreads), 0,
                      static_cast<cudaStream_t>(stream), group, options, inputs, step_count);
}

}  // namespace dykaf::cuda
