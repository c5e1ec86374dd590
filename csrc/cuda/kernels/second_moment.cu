// The compact second moments (see csrc/cpu/second_moment.cpp for the formulas). rank_one: a
// splitting step of scale^2 l r^T towards beta2 of itself and 1 - beta2 of G o G (Yudin et al.,
// arXiv 2511.06477). factored: row and column means (Shazeer & Stern 2018).
#include "cuda/kernels/device/lookup.cuh"
#include "cuda/kernels/device/reduce.cuh"
#include "cuda/kernels/second_moment.h"

namespace dykaf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kColsPerBlock = kWarpSize;

// r of rank_one before its first step is the constant unit vector.
DYKAF_DEVICE double unit_entry(const float* vector, double scale, int64_t i, int64_t size) {
  return scale == 0.0 ? 1.0 / sqrt(static_cast<double>(size)) : static_cast<double>(vector[i]);
}

// row_sums_i = sum_j H_ij^2 x_j, x = r or ones. One warp per row, kWarps rows per block.
__global__ void __launch_bounds__(kThreads)
    moment_row_sums_kernel(const __grid_constant__ Grouped<MomentProblem> launch,
                           const __grid_constant__ Group group) {
  const int block = static_cast<int>(blockIdx.x);
  const MomentProblem q = launch.problems[find_problem(launch.problems, launch.num, block)];
  const MatrixOnDevice& p = group.matrices[q.matrix_idx];
  if (group.scalars[q.matrix_idx].active == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t row = static_cast<int64_t>(block - q.tile_begin) * kWarps +
                      static_cast<int>(threadIdx.x) / kWarpSize;
  if (row >= p.m) return;  // whole warps; no barrier follows
  const bool rank_one = q.u != nullptr;
  double sum = 0.0;
  for (int64_t j = lane; j < p.n; j += kWarpSize) {
    const double h = q.H[row * p.n + j];
    sum += h * h * (rank_one ? unit_entry(p.exp_avg_sq_col, *p.exp_avg_sq_scale, j, p.n) : 1.0);
  }
  sum = warp_sum(sum);
  if (lane == 0) q.row_sums[row] = sum;
}

// col_sums_j = sum_i H_ij^2 w_i, w = u or ones. Blocks own kColsPerBlock columns; warp w sums rows
// w, w + kWarps, ..., and the warps' sums are added in order.
__global__ void __launch_bounds__(kThreads)
    moment_col_sums_kernel(const __grid_constant__ Grouped<MomentProblem> launch,
                           const __grid_constant__ Group group) {
  DYKAF_SHARED(double, partials, [kWarps * kColsPerBlock]);
  const int block = static_cast<int>(blockIdx.x);
  const MomentProblem q = launch.problems[find_problem(launch.problems, launch.num, block)];
  const MatrixOnDevice& p = group.matrices[q.matrix_idx];
  if (group.scalars[q.matrix_idx].active == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t col = static_cast<int64_t>(block - q.tile_begin) * kColsPerBlock + lane;
  double sum = 0.0;
  for (int64_t i = warp; i < p.m && col < p.n; i += kWarps) {
    const double h = q.H[i * p.n + col];
    sum += h * h * (q.u != nullptr ? q.u[i] : 1.0);
  }
  partials[warp * kColsPerBlock + lane] = sum;
  __syncthreads();
  if (warp != 0 || col >= p.n) return;
  sum = 0.0;
  for (int w = 0; w < kWarps; ++w) sum += partials[w * kColsPerBlock + lane];
  q.col_sums[col] = sum;
}

// a = beta2 scale^2 and b = (1 - beta2) tau^2, in units of the larger of the two.
struct Weights {
  double unit;
  double a;
  double b;
};

DYKAF_DEVICE Weights rank_one_weights(double beta2, double scale, double tau) {
  const double unit = fmax(tau, scale);
  const double old_part = scale / unit;
  const double new_part = tau / unit;
  return {unit, beta2 * old_part * old_part, (1 - beta2) * new_part * new_part};
}

// u = (a l + b row_sums) / its norm; scratch = {a <u, l>, 1}, or {., 0} if the norm vanishes.
// One block per matrix.
__global__ void __launch_bounds__(kThreads)
    moment_row_vector_kernel(const __grid_constant__ Grouped<MomentProblem> launch,
                             const __grid_constant__ Group group, double beta2) {
  DYKAF_SHARED(double, scratch, [2 * kWarps]);
  const MomentProblem q = launch.problems[blockIdx.x];
  const MatrixOnDevice& p = group.matrices[q.matrix_idx];
  const MatrixScalars& s = group.scalars[q.matrix_idx];
  if (s.active == 0 || q.u == nullptr) return;
  const double scale = *p.exp_avg_sq_scale;
  const Weights w = rank_one_weights(beta2, scale, static_cast<double>(s.adam_tau));
  double sums[2] = {0.0, 0.0};  // ||K||^2, <K, l>
  for (int64_t i = static_cast<int>(threadIdx.x); i < p.m; i += kThreads) {
    const double l = unit_entry(p.exp_avg_sq_row, scale, i, p.m);
    const double K = w.a * l + w.b * q.row_sums[i];
    sums[0] += K * K;
    sums[1] += K * l;
    q.u[i] = K;
  }
  block_sum(sums, scratch, kThreads);
  const double norm = sqrt(sums[0]);
  for (int64_t i = static_cast<int>(threadIdx.x); i < p.m; i += kThreads) q.u[i] /= norm;
  if (threadIdx.x == 0) {
    q.scratch[0] = w.a * sums[1] / norm;
    q.scratch[1] = norm > 0 ? 1.0 : 0.0;
  }
}

DYKAF_DEVICE void rank_one_vectors(const MomentProblem& q, const MatrixOnDevice& p,
                                   const MatrixScalars& s, double beta2, double* scratch) {
  const double scale = *p.exp_avg_sq_scale;
  const Weights w = rank_one_weights(beta2, scale, static_cast<double>(s.adam_tau));
  const double c = q.scratch[0];
  const auto B = [&](int64_t j) {
    return c * unit_entry(p.exp_avg_sq_col, scale, j, p.n) + w.b * q.col_sums[j];
  };
  double sum[1] = {0.0};
  for (int64_t j = static_cast<int>(threadIdx.x); j < p.n; j += kThreads) sum[0] += B(j) * B(j);
  block_sum(sum, scratch, kThreads);
  const double norm = sqrt(sum[0]);
  const bool moves = q.scratch[1] != 0.0 && norm > 0;
  const double new_scale = moves ? w.unit * sqrt(norm) : scale;
  for (int64_t i = static_cast<int>(threadIdx.x); i < p.m; i += kThreads) {
    const double l = moves ? q.u[i] : unit_entry(p.exp_avg_sq_row, scale, i, p.m);
    p.exp_avg_sq_row[i] = static_cast<float>(l);
    q.row_root[i] = sqrtf(p.exp_avg_sq_row[i]) * static_cast<float>(new_scale);
  }
  for (int64_t j = static_cast<int>(threadIdx.x); j < p.n; j += kThreads) {
    const double r = moves ? B(j) / norm : unit_entry(p.exp_avg_sq_col, scale, j, p.n);
    p.exp_avg_sq_col[j] = static_cast<float>(r);
    q.col_root[j] = sqrtf(p.exp_avg_sq_col[j]);
  }
  // All have read the old scale: block_sum waited for them.
  if (threadIdx.x == 0) *p.exp_avg_sq_scale = new_scale;
}

DYKAF_DEVICE void factored_vectors(const MomentProblem& q, const MatrixOnDevice& p,
                                   const MatrixScalars& s, double beta2, double* scratch) {
  const double tau = s.adam_tau;
  const double gain = (1 - beta2) * tau * tau;
  const auto m = static_cast<double>(p.m);
  const auto n = static_cast<double>(p.n);
  double mean[1] = {0.0};
  for (int64_t i = static_cast<int>(threadIdx.x); i < p.m; i += kThreads) {
    const double old = p.exp_avg_sq_row[i];
    p.exp_avg_sq_row[i] = static_cast<float>(beta2 * old + gain / n * q.row_sums[i]);
    mean[0] += static_cast<double>(p.exp_avg_sq_row[i]);
  }
  block_sum(mean, scratch, kThreads);
  mean[0] /= m;
  const float inverse = mean[0] > 0 ? static_cast<float>(1 / sqrt(mean[0])) : 0.0f;
  for (int64_t i = static_cast<int>(threadIdx.x); i < p.m; i += kThreads) {
    q.row_root[i] = sqrtf(p.exp_avg_sq_row[i]) * inverse;
  }
  for (int64_t j = static_cast<int>(threadIdx.x); j < p.n; j += kThreads) {
    const double old = p.exp_avg_sq_col[j];
    p.exp_avg_sq_col[j] = static_cast<float>(beta2 * old + gain / m * q.col_sums[j]);
    q.col_root[j] = sqrtf(p.exp_avg_sq_col[j]);
  }
}

// The new vectors and their roots. One block per matrix.
__global__ void __launch_bounds__(kThreads)
    moment_vectors_kernel(const __grid_constant__ Grouped<MomentProblem> launch,
                          const __grid_constant__ Group group, double beta2) {
  DYKAF_SHARED(double, scratch, [kWarps]);
  const MomentProblem q = launch.problems[blockIdx.x];
  const MatrixOnDevice& p = group.matrices[q.matrix_idx];
  const MatrixScalars& s = group.scalars[q.matrix_idx];
  if (s.active == 0) return;
  if (q.u != nullptr) {
    rank_one_vectors(q, p, s, beta2, scratch);
  } else {
    factored_vectors(q, p, s, beta2, scratch);
  }
}

}  // namespace

int64_t moment_tiles(MomentStage stage, int64_t m, int64_t n) {
  return stage == MomentStage::kRowSums ? ceil_div(m, kWarps) : ceil_div(n, kColsPerBlock);
}

int launch_moment(MomentStage stage, const Grouped<MomentProblem>& launch, const Group& group,
                  double beta2, Stream stream) {
  const dim3 tiles(static_cast<unsigned>(launch.grid));
  const dim3 one_per_matrix(static_cast<unsigned>(launch.num));
  const dim3 threads(kThreads);
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  switch (stage) {
    case MomentStage::kRowSums:
      return DYKAF_LAUNCH(moment_row_sums_kernel, tiles, threads, 0, cuda_stream, launch, group);
    case MomentStage::kColSums:
      return DYKAF_LAUNCH(moment_col_sums_kernel, tiles, threads, 0, cuda_stream, launch, group);
    case MomentStage::kRowVector:
      return DYKAF_LAUNCH(moment_row_vector_kernel, one_per_matrix, threads, 0, cuda_stream, launch,
                          group, beta2);
    case MomentStage::kVectors:
      return DYKAF_LAUNCH(moment_vectors_kernel, one_per_matrix, threads, 0, cuda_stream, launch,
                          group, beta2);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace dykaf::cuda
