// What skinny matrices have of their own: csrc/aten/skinny_step.cpp has the same in tensors.
#include "cuda/kernels/device/elements.cuh"
#include "cuda/kernels/device/lookup.cuh"
#include "cuda/kernels/device/reduce.cuh"
#include "cuda/kernels/skinny.h"
#include "dykaf/bounds.h"

namespace dykaf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// A block of the first stage works on this much of the short and of the long side.
constexpr int kShort = 16;
constexpr int kLong = 256;
constexpr int kQuad = 4;
constexpr int kStride = kLong + kQuad;  // rows apart by a multiple of 16 bytes, banks by 4

// A part of a matrix, and the same part of the array that holds it.
struct Part {
  int64_t piece;  // of the long side
  int64_t i;      // from here on the short side
  int64_t j;      // from here on the long side
  int num_i;
  int num_j;
};

DYKAF_DEVICE Part locate_part(const MatrixOnDevice& p, int64_t tile) {
  Part part;
  const int64_t parts_i = ceil_div(p.short_side(), kShort);
  part.piece = tile / parts_i;
  part.i = tile % parts_i * kShort;
  part.j = part.piece * kLong;
  part.num_i = static_cast<int>(min(int64_t{kShort}, p.short_side() - part.i));
  part.num_j = static_cast<int>(min(int64_t{kLong}, p.long_side() - part.j));
  return part;
}

// exp_avg, and X from the array to `tile` [kShort, kStride], the short side first; exp_avg to
// `momenta` likewise.
DYKAF_DEVICE void blend_part_(const MatrixOnDevice& p, const MatrixScalars& s, const AdamOptions& o,
                              const float* X, const Part& part, float* tile, float* momenta) {
  const bool is_wide = p.is_wide();
  const int num_rows = is_wide ? part.num_i : part.num_j;
  const int num_cols = is_wide ? part.num_j : part.num_i;
  const int units_per_row = (num_cols + kUnit - 1) / kUnit;
  const int64_t first = (is_wide ? part.i : part.j) * p.n + (is_wide ? part.j : part.i);
  for (int u = static_cast<int>(threadIdx.x); u < num_rows * units_per_row; u += kThreads) {
    const int row = u / units_per_row;
    const int col = u % units_per_row * kUnit;
    const int count = min(kUnit, num_cols - col);
    const int64_t start = first + row * p.n + col;
    const bool aligned = is_aligned(X, start, 4) && is_aligned(p.exp_avg, start, 4);
    float x[kUnit];
    float exp_avg[kUnit];
    load_unit(X + start, count, aligned, x);
    load_unit(p.exp_avg + start, count, aligned, exp_avg);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      exp_avg[e] = blend_momentum(exp_avg[e], gradient_of(x[e], s), o);
      const int place = is_wide ? row * kStride + col + e : (col + e) * kStride + row;
      tile[place] = fabsf(x[e]) < s.noise ? 0.0f : x[e];
      momenta[place] = exp_avg[e];
    }
    store_unit(p.exp_avg + start, count, aligned, exp_avg);
  }
}

// The tile as rows of length l of the basis.
DYKAF_DEVICE void append_part_(float* rows, int64_t l, const Part& part, const float* tile) {
  constexpr int kQuadsPerRow = kLong / kQuad;
  for (int u = static_cast<int>(threadIdx.x); u < part.num_i * kQuadsPerRow; u += kThreads) {
    const int i = u / kQuadsPerRow;
    const int j = u % kQuadsPerRow * kQuad;
    const float* from = tile + i * kStride + j;
    float* to = rows + (part.i + i) * l + part.j + j;
    if (j + kQuad <= part.num_j && is_aligned(to, 0, 4)) {
      store_global4(to, make_float4(from[0], from[1], from[2], from[3]));
      continue;
    }
    for (int e = 0; e < kQuad && j + e < part.num_j; ++e) to[e] = from[e];
  }
}

// One block per part of a matrix.
__global__ void __launch_bounds__(kThreads)
    skinny_gradient_kernel(const __grid_constant__ Grouped<SkinnyProblem> launch,
                           const __grid_constant__ Group group) {
  DYKAF_SHARED(float, tile, [kShort * kStride]);
  DYKAF_SHARED(float, momenta, [kShort * kStride]);
  const int block = static_cast<int>(blockIdx.x);
  const SkinnyProblem q = launch.problems[find_problem(launch.problems, launch.num, block)];
  const MatrixOnDevice& p = group.matrices[q.matrix_idx];
  const MatrixScalars& s = group.scalars[q.matrix_idx];
  if (s.active == 0) return;
  const Part part = locate_part(p, block - q.tile_begin);
  blend_part_(p, s, group.adam, q.X, part, tile, momenta);
  __syncthreads();
  const int64_t l = p.long_side();
  append_part_(p.basis + q.used * l, l, part, tile);

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i < part.num_i; i += kWarps) {
    double sum = 0.0;
    double momentum_sum = 0.0;
    for (int j = lane; j < part.num_j; j += kWarpSize) {
      const double x = tile[i * kStride + j];
      const double momentum = momenta[i * kStride + j];
      sum += x * x;
      momentum_sum += momentum * momentum;
    }
    sum = warp_sum(sum);
    momentum_sum = warp_sum(momentum_sum);
    if (lane == 0) {
      q.sums[part.piece * p.short_side() + part.i + i] = sum;
      q.momentum_sums[part.piece * p.short_side() + part.i + i] = momentum_sum;
    }
  }
}

// One warp per row of the short side, kWarps rows per block.
__global__ void __launch_bounds__(kThreads)
    skinny_moments_kernel(const __grid_constant__ Grouped<SkinnyProblem> launch,
                          const __grid_constant__ Group group) {
  const int block = static_cast<int>(blockIdx.x);
  const SkinnyProblem q = launch.problems[find_problem(launch.problems, launch.num, block)];
  const MatrixOnDevice& p = group.matrices[q.matrix_idx];
  const MatrixScalars& s = group.scalars[q.matrix_idx];
  const AdamOptions& o = group.adam;
  if (s.active == 0) return;
  const int64_t num_rows = p.short_side();
  const int64_t l = p.long_side();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t i = static_cast<int64_t>(block - q.tile_begin) * kWarps +
                    static_cast<int>(threadIdx.x) / kWarpSize;
  if (i >= num_rows) return;  // whole warps; no barrier follows
  const auto place = [&](int64_t j) { return p.is_wide() ? i * q.inner + j : j * num_rows + i; };

  // In V what is rounding of rows this long is nothing.
  const float noise = s.noise * sqrtf(static_cast<float>(l));
  const auto gradient_in = [&](int64_t j) {
    const float x = q.XV[place(j)];
    return fabsf(x) < noise ? 0.0f : x;
  };
  double total = 0.0;
  double momentum_total = 0.0;
  for (int64_t piece = lane; piece < ceil_div(l, kLong); piece += kWarpSize) {
    total += q.sums[piece * num_rows + i];
    momentum_total += q.momentum_sums[piece * num_rows + i];
  }
  double inside = 0.0;
  for (int64_t j = lane; j < q.inner; j += kWarpSize) {
    const double x = gradient_in(j);
    inside += x * x;
  }
  total = warp_sum(total);
  inside = warp_sum(inside);
  momentum_total = warp_sum(momentum_total);
  const auto momentum_noise = static_cast<float>(rounding_share<float>(1) * sqrt(momentum_total));

  const auto inverse_root = [&](float& second_moment, float g) {
    second_moment = o.beta2 * second_moment + o.one_minus_beta2 * g * g;
    return 1.0f / (sqrtf(second_moment) * s.correction2 + o.eps);
  };
  float* exp_avg_sq = p.exp_avg_sq + i * (p.skinny_rank + 1);
  // Below the bound on its rounding the difference is not known.
  const double outside = fmax(total - inside, o.least_outside * total);
  const auto rest = static_cast<float>(sqrt(outside / static_cast<double>(l - q.inner)));
  float beyond = 0.0f;
  if (lane == 0) q.beyond[i] = beyond = inverse_root(exp_avg_sq[p.skinny_rank], s.adam_tau * rest);
  beyond = __shfl_sync(kFullMask, beyond, 0);
  for (int64_t j = lane; j < q.inner; j += kWarpSize) {
    const float g = s.adam_tau * gradient_in(j);
    const float within = inverse_root(exp_avg_sq[j], g);
    float& MV = q.MV[place(j)];
    const float known = numerator(fabsf(MV) < momentum_noise ? 0.0f : MV, g, s);
    MV = fminf(fmaxf(known * within, -s.update_bound), s.update_bound) - known * beyond;
  }
}

// The average of the long side, beta rho^2 of the old one and (1 - beta) tau^2 / s of X^T X, in
// unit trace. One block per matrix.
__global__ void __launch_bounds__(kThreads)
    skinny_long_factor_kernel(const __grid_constant__ Grouped<SkinnyProblem> launch,
                              const __grid_constant__ Group group, double beta) {
  DYKAF_SHARED(double, scratch, [kWarps]);
  const SkinnyProblem q = launch.problems[blockIdx.x];
  const MatrixOnDevice& p = group.matrices[q.matrix_idx];
  const MatrixScalars& s = group.scalars[q.matrix_idx];
  if (s.active == 0) return;
  const int64_t num_rows = p.short_side();
  const int64_t num_sums = num_rows * ceil_div(p.long_side(), kLong);
  double& rho = p.rho[p.is_wide() ? 1 : 0];
  double total[1] = {0.0};
  for (int64_t i = static_cast<int>(threadIdx.x); i < num_sums; i += kThreads) {
    total[0] += q.sums[i];
  }
  block_sum(total, scratch, kThreads);
  const double ratio = rho / static_cast<double>(s.tau);
  const double kept = beta * ratio * ratio;
  const double gain = (1 - beta) / static_cast<double>(num_rows);
  const double trace = kept + gain * total[0];
  if (!(trace > 0)) return;

  const auto decay = static_cast<float>(kept / trace);
  const auto added = static_cast<float>(gain / trace);
  const int64_t size = 2 * p.skinny_rank;
  for (int64_t i = static_cast<int>(threadIdx.x); i < int64_t{q.used} * q.used; i += kThreads) {
    p.core[i / q.used * size + i % q.used] *= decay;
  }
  for (int64_t i = static_cast<int>(threadIdx.x); i < num_rows; i += kThreads) {
    p.core[(q.used + i) * (size + 1)] = added;
  }
  __syncthreads();  // all have read rho
  if (threadIdx.x == 0) {
    *p.flat *= decay;
    rho = static_cast<double>(s.tau) * sqrt(trace);
  }
}

}  // namespace

int64_t skinny_pieces(int64_t l) { return ceil_div(l, kLong); }

int64_t skinny_tiles(SkinnyStage stage, int64_t s, int64_t l) {
  return stage == SkinnyStage::kGradient ? ceil_div(s, kShort) * ceil_div(l, kLong)
                                         : ceil_div(s, kWarps);
}

int launch_skinny(SkinnyStage stage, const Grouped<SkinnyProblem>& launch, const Group& group,
                  double factor_beta, Stream stream) {
  const dim3 tiles(static_cast<unsigned>(launch.grid));
  const dim3 threads(kThreads);
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  switch (stage) {
    case SkinnyStage::kGradient:
      return DYKAF_LAUNCH(skinny_gradient_kernel, tiles, threads, 0, cuda_stream, launch, group);
    case SkinnyStage::kMoments:
      return DYKAF_LAUNCH(skinny_moments_kernel, tiles, threads, 0, cuda_stream, launch, group);
    case SkinnyStage::kLongFactor:
      return DYKAF_LAUNCH(skinny_long_factor_kernel, tiles, threads, 0, cuda_stream, launch, group,
                          factor_beta);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace dykaf::cuda
