// The coefficients of the factor update from inner products. In units of tau,
// a = beta (rho / tau)^2 and b = 1 - beta (docs/algorithm.md; Yudin et al., arXiv 2511.06477).
#include <limits>

#include "cuda/kernels/device/reduce.cuh"
#include "cuda/kernels/factor_scalars.h"
#include "cuda/kernels/gemm.h"

namespace dykaf::cuda {
namespace {

// An infinite gain times an increment of zero would be NaN.
constexpr double kLargest = std::numeric_limits<float>::max();

constexpr int kThreads = 128;

// Of a factor F and its increment A. All terms of the norms are non-negative.
struct InnerProducts {
  double FF;
  double FA;
  double AA;

  DYKAF_DEVICE double norm(double a, double b) const {
    return sqrt(a * a * FF + 2 * a * b * FA + b * b * AA);
  }
  DYKAF_DEVICE double with_factor(double a, double b) const { return a * FF + b * FA; }
};

// Sums the partials of all tiles in a fixed order; every thread gets the result.
DYKAF_DEVICE InnerProducts sum_partials(const double* partials, int num_tiles, double* scratch) {
  double sums[kNumSums] = {};
  for (int tile = static_cast<int>(threadIdx.x); tile < num_tiles; tile += kThreads) {
#pragma unroll
    for (int i = 0; i < kNumSums; ++i) sums[i] += partials[int64_t{tile} * kNumSums + i];
  }
  block_sum(sums, scratch, kThreads);
  return {sums[0], sums[1], sums[2]};
}

DYKAF_DEVICE void set_blend(MatrixScalars& s, Side side, double a, double b, double norm) {
  s.keep_factor[static_cast<int>(side)] = static_cast<float>(a / norm);
  s.gain[static_cast<int>(side)] = static_cast<float>(fmin(b / norm, kLargest));
}

DYKAF_DEVICE void set_rho(double* rho, double value) {
  rho[0] = value;
  rho[1] = value;
}

// Lubich-Oseledets: the K-step, whose S-step number c the other side needs.
DYKAF_DEVICE void ksl_left(MatrixScalars& s, const InnerProducts& K, double a, double b) {
  const double norm = K.norm(a, b);
  s.stopped = norm > 0 ? 0 : 1;
  s.c = a * K.with_factor(a, b) / norm;
  set_blend(s, Side::kLeft, a, b, norm);
}

DYKAF_DEVICE void ksl_right(MatrixScalars& s, double* rho, const InnerProducts& B, double b) {
  if (s.stopped != 0) return;
  const double norm = B.norm(s.c, b);
  s.stopped = norm > 0 ? 0 : 1;
  if (s.stopped != 0) return;
  set_blend(s, Side::kRight, s.c, b, norm);
  set_rho(rho, static_cast<double>(s.tau) * sqrt(norm));
}

// Ceruti-Lubich: both factors from the old ones, then the Galerkin step.
DYKAF_DEVICE void bug(MatrixScalars& s, double* rho, const InnerProducts& K, const InnerProducts& J,
                      double coupling, double a, double b) {
  const double norm_K = K.norm(a, b);
  const double norm_J = J.norm(a, b);
  const double with_gradient = a * a * K.FA + a * b * (K.AA + J.AA) + b * b * coupling;
  const double norm =
      (a * K.with_factor(a, b) * J.with_factor(a, b) + b * with_gradient) / (norm_K * norm_J);
  // Where K or J vanishes so does the numerator, and the quotient is NaN.
  s.stopped = norm > 0 ? 0 : 1;
  if (s.stopped != 0) return;
  set_blend(s, Side::kLeft, a, b, norm_K);
  set_blend(s, Side::kRight, a, b, norm_J);
  set_rho(rho, static_cast<double>(s.tau) * sqrt(norm));
}

// F <- beta rho^2 F + (1 - beta) tau^2 increment / size, in unit norm with rho to match.
DYKAF_DEVICE void average(MatrixScalars& s, const MatrixOnDevice& p, Side side,
                          const InnerProducts& F, double a, double b) {
  const double norm = F.norm(a, b);
  const auto i = static_cast<int>(side);
  if (!(norm > 0)) {
    s.keep_factor[i] = 1.0f;
    s.gain[i] = 0.0f;
    return;
  }
  set_blend(s, side, a, b, norm);
  const double rho = static_cast<double>(s.tau) * sqrt(norm);
  if (p.has_two_averages) {
    p.rho[i] = rho;
  } else {
    set_rho(p.rho, rho);
  }
}

// One block per problem.
__global__ void __launch_bounds__(kThreads)
    factor_scalars_kernel(const __grid_constant__ Grouped<FactorProblem> launch,
                          const __grid_constant__ Group group, double beta) {
  DYKAF_SHARED(double, scratch, [kNumSums * kThreads / kWarpSize]);
  const FactorProblem f = launch.problems[blockIdx.x];
  const MatrixOnDevice& p = group.matrices[f.matrix_idx];
  MatrixScalars& s = group.scalars[f.matrix_idx];
  if (s.active == 0) return;
  const InnerProducts left = sum_partials(f.left, f.left_tiles, scratch);
  const InnerProducts right = sum_partials(f.right, f.right_tiles, scratch);
  const InnerProducts coupling = sum_partials(f.coupling, f.coupling_tiles, scratch);
  if (threadIdx.x != 0) return;

  const bool is_left = f.stage == FactorStage::kKslLeft || f.stage == FactorStage::kAverageLeft;
  const Side side = is_left ? Side::kLeft : Side::kRight;
  const bool is_average =
      f.stage == FactorStage::kAverageLeft || f.stage == FactorStage::kAverageRight;
  if (s.zero_gradient != 0) {
    // Once per factor, or once for both.
    if (is_average && p.has_two_averages) {
      p.rho[static_cast<int>(side)] *= sqrt(beta);
    } else if (f.stage != FactorStage::kKslLeft) {
      set_rho(p.rho, p.rho[0] * sqrt(beta));
    }
    return;
  }
  const double ratio = p.rho[is_average ? static_cast<int>(side) : 0] / static_cast<double>(s.tau);
  const double a = beta * ratio * ratio;
  const double b = 1 - beta;
  switch (f.stage) {
    case FactorStage::kKslLeft:
      return ksl_left(s, left, a, b);
    case FactorStage::kKslRight:
      return ksl_right(s, p.rho, right, b);
    case FactorStage::kBug:
      return bug(s, p.rho, left, right, coupling.FA, a, b);
    case FactorStage::kAverageLeft:
      return average(s, p, side, left, a, b / f.size);
    case FactorStage::kAverageRight:
      return average(s, p, side, right, a, b / f.size);
  }
}

}  // namespace

int launch_factor_scalars(const Grouped<FactorProblem>& launch, const Group& group,
                          double factor_beta, Stream stream) {
  return DYKAF_LAUNCH(factor_scalars_kernel, dim3(static_cast<unsigned>(launch.num)),
                      dim3(kThreads), 0, static_cast<cudaStream_t>(stream), launch, group,
                      factor_beta);
}

}  // namespace dykaf::cuda
