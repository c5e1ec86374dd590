// Element-wise work: loading gradients, Adam, the parameters' update, blending factors.
#include "cuda/kernels/device/elements.cuh"
#include "cuda/kernels/device/lookup.cuh"
#include "cuda/kernels/device/reduce.cuh"
#include "cuda/kernels/elements.h"

namespace dykaf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 2;
constexpr int kUnitsPerBlock = kThreads * kUnitsPerThread;

// A unit of an m x n array: units do not cross rows.
struct UnitPlace {
  int64_t row;
  int64_t col;
  int64_t start;  // row n + col
  int count;
};

DYKAF_DEVICE UnitPlace locate_unit(int64_t unit, int64_t n) {
  const int64_t units_per_row = ceil_div(n, kUnit);
  UnitPlace place;
  place.row = unit / units_per_row;
  place.col = unit % units_per_row * kUnit;
  place.start = place.row * n + place.col;
  place.count = static_cast<int>(min(int64_t{kUnit}, n - place.col));
  return place;
}

DYKAF_DEVICE void load_place(const float* array, const UnitPlace& place, float (&x)[kUnit]) {
  load_unit(array + place.start, place.count, is_aligned(array, place.start, 4), x);
}

DYKAF_DEVICE void store_place(float* array, const UnitPlace& place, const float (&x)[kUnit]) {
  store_unit(array + place.start, place.count, is_aligned(array, place.start, 4), x);
}

DYKAF_DEVICE void load_gradient_unit(const MatrixOnDevice& p, const MatrixScalars& s,
                                     const UnitPlace& place, float (&x)[kUnit]) {
  load_unit(p.grad, p.dtype, place.start, place.count,
            is_aligned(p.grad, place.start, element_size(p.dtype)), x);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) x[i] *= s.load_scale;
}

DYKAF_DEVICE void apply_unit_(const MatrixOnDevice& p, const MatrixScalars& s,
                              const UnitPlace& place, const float (&update)[kUnit]) {
  apply_unit_<Extent::kShard>(p, s, place.start, place.count,
                              is_aligned(p.param, place.start, element_size(p.dtype)),
                              is_aligned(p.master, place.start, 4), update);
}

DYKAF_DEVICE void adam_unit_(const MatrixOnDevice& p, const MatrixScalars& s, const AdamOptions& o,
                             const UnitPlace& place, const float (&h)[kUnit],
                             float (&update)[kUnit]) {
  adam_unit_(p, s, o, place.start, place.count,
             is_aligned(p.exp_avg, place.start, 4) && is_aligned(p.exp_avg_sq, place.start, 4), h,
             update);
}

// x diag(row) diag(col); null: the identity.
DYKAF_DEVICE void weigh_unit(const float* row, const float* col, const UnitPlace& place,
                             float (&x)[kUnit]) {
  if (row != nullptr) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) x[i] *= row[place.row];
  }
  if (col != nullptr) {
    float weights[kUnit];
    load_unit(col + place.col, place.count, true, weights);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) x[i] *= weights[i];
  }
}

DYKAF_DEVICE float sum_of_squares(const UnitPlace& place, const float (&update)[kUnit]) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) squares += i < place.count ? update[i] * update[i] : 0.0f;
  return squares;
}

// run_unit_ is an operation on one unit. Those with partial sums return the unit's.
DYKAF_DEVICE void run_unit_(const LoadProblem& e, const MatrixOnDevice& p, const MatrixScalars& s,
                            const AdamOptions&, const UnitPlace& place) {
  float h[kUnit];
  load_gradient_unit(p, s, place, h);
  store_place(e.H, place, h);
}

DYKAF_DEVICE float run_unit_(const AdamProblem& e, const MatrixOnDevice& p, const MatrixScalars& s,
                             const AdamOptions& o, const UnitPlace& place) {
  float h[kUnit];
  float update[kUnit];
  if (e.H != nullptr) {
    load_place(e.H, place, h);
  } else {
    load_gradient_unit(p, s, place, h);
  }
  adam_unit_(p, s, o, place, h, update);
  store_place(e.update, place, update);
  return sum_of_squares(place, update);
}

DYKAF_DEVICE float run_unit_(const CompactAdamProblem& e, const MatrixOnDevice& p,
                             const MatrixScalars& s, const AdamOptions& o, const UnitPlace& place) {
  const bool aligned = is_aligned(p.exp_avg, place.start, 4);
  float h[kUnit];
  float exp_avg[kUnit];
  float root[kUnit];
  float update[kUnit];
  load_place(e.H, place, h);
  load_unit(p.exp_avg + place.start, place.count, aligned, exp_avg);
  load_unit(e.col_root + place.col, place.count, true, root);
  const float row = e.row_root[place.row] * s.correction2;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const float g = gradient_of(h[i], s);
    exp_avg[i] = blend_momentum(exp_avg[i], g, o);
    // Row and column means can be far below an entry's own second moment.
    const float ratio = numerator(exp_avg[i], g, s) / (row * root[i] + o.eps);
    update[i] = fminf(fmaxf(ratio, -s.update_bound), s.update_bound);
  }
  store_unit(p.exp_avg + place.start, place.count, aligned, exp_avg);
  store_place(e.update, place, update);
  return sum_of_squares(place, update);
}

DYKAF_DEVICE void run_unit_(const ApplyProblem& e, const MatrixOnDevice& p, const MatrixScalars& s,
                            const AdamOptions&, const UnitPlace& place) {
  float update[kUnit];
  load_place(e.update, place, update);
  apply_unit_(p, s, place, update);
}

DYKAF_DEVICE float run_unit_(const AdamWProblem&, const MatrixOnDevice& p, const MatrixScalars& s,
                             const AdamOptions& o, const UnitPlace& place) {
  float h[kUnit];
  float update[kUnit];
  load_gradient_unit(p, s, place, h);
  adam_unit_(p, s, o, place, h, update);
  apply_unit_(p, s, place, update);
  return sum_of_squares(place, update);
}

// The weights hold what there is of exp_avg_sq.
DYKAF_DEVICE float run_unit_(const BeyondProblem& e, const MatrixOnDevice& p,
                             const MatrixScalars& s, const AdamOptions&, const UnitPlace& place) {
  float within[kUnit];
  float h[kUnit] = {};
  float update[kUnit];
  load_place(e.update, place, within);
  load_place(p.exp_avg, place, update);
  if (e.H != nullptr) load_place(e.H, place, h);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) update[i] = numerator(update[i], gradient_of(h[i], s), s);
  weigh_unit(e.row, e.col, place, update);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) update[i] += within[i];
  store_place(e.update, place, update);
  return sum_of_squares(place, update);
}

DYKAF_DEVICE float run_unit_(const SquaresProblem& e, const MatrixOnDevice&, const MatrixScalars&,
                             const AdamOptions&, const UnitPlace& place) {
  float update[kUnit];
  load_place(e.update, place, update);
  return sum_of_squares(place, update);
}

DYKAF_DEVICE void run_unit_(const NormalizeProblem& e, const MatrixOnDevice& p,
                            const MatrixScalars&, const AdamOptions&, const UnitPlace& place) {
  const float norm = *p.update_rms * sqrtf(static_cast<float>(p.m * p.n));
  const float divisor = norm == 0.0f ? 1.0f : norm;
  float update[kUnit];
  load_place(e.update, place, update);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) update[i] /= divisor;
  store_place(e.X, place, update);
}

DYKAF_DEVICE float run_unit_(const QuinticProblem& e, const MatrixOnDevice& p, const MatrixScalars&,
                             const AdamOptions& o, const UnitPlace& place) {
  const auto side = static_cast<float>(max(p.m, p.n));
  const float scale = sqrtf(inverse_bound(e.bound)) *
                      (e.is_last ? update_scale(side, o.full_rms, p.update_rms) : 1.0f);
  float x[kUnit];
  float next[kUnit];
  load_place(e.X, place, x);
  load_place(e.next, place, next);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) next[i] = quintic(x[i], next[i], scale);
  store_place(e.next, place, next);
  return sum_of_squares(place, next);
}

// One block per kUnitsPerBlock units, in the order of the problems; each thread takes every
// kThreads-th unit. Weights and roots start at multiples of 256 bytes.
template <typename ElementProblem>
__global__ void __launch_bounds__(kThreads)
    elements_kernel(const __grid_constant__ Grouped<ElementProblem> launch,
                    const __grid_constant__ Group group) {
  constexpr bool kSums = requires(const ElementProblem& e) { e.partials; };
  DYKAF_SHARED(double, scratch, [kThreads / kWarpSize]);
  const int block = static_cast<int>(blockIdx.x);
  const ElementProblem e = launch.problems[find_problem(launch.problems, launch.num, block)];
  const MatrixOnDevice& p = group.matrices[e.matrix_idx];
  const MatrixScalars& s = group.scalars[e.matrix_idx];
  if (s.active == 0) return;

  const int64_t num_units = e.m * ceil_div(e.n, kUnit);
  const int64_t first = static_cast<int64_t>(block - e.tile_begin) * kUnitsPerBlock;
  double sum[1] = {0.0};
#pragma unroll
  for (int u = 0; u < kUnitsPerThread; ++u) {
    const int64_t unit = first + u * kThreads + static_cast<int>(threadIdx.x);
    if (unit >= num_units) break;
    const UnitPlace place = locate_unit(unit, e.n);
    if constexpr (kSums) {
      sum[0] += run_unit_(e, p, s, group.adam, place);
    } else {
      run_unit_(e, p, s, group.adam, place);
    }
  }
  if constexpr (kSums) {
    block_sum(sum, scratch, kThreads);
    if (threadIdx.x == 0) e.partials[block - e.tile_begin] = sum[0];
  }
}

// As above; the factor is one long row.
__global__ void __launch_bounds__(kThreads)
    blend_kernel(const __grid_constant__ Grouped<BlendProblem> launch,
                 const __grid_constant__ Group group) {
  const int block = static_cast<int>(blockIdx.x);
  const BlendProblem b = launch.problems[find_problem(launch.problems, launch.num, block)];
  const MatrixScalars& s = group.scalars[b.matrix_idx];
  if (s.active == 0 || s.zero_gradient != 0 || s.stopped != 0) return;
  const float keep = s.keep_factor[static_cast<int>(b.side)];
  const float gain = s.gain[static_cast<int>(b.side)];
  if (keep == 1.0f && gain == 0.0f) return;  // the increment may be NaN
  const int64_t first = static_cast<int64_t>(block - b.tile_begin) * kUnitsPerBlock;
#pragma unroll
  for (int u = 0; u < kUnitsPerThread; ++u) {
    const int64_t start = (first + u * kThreads + static_cast<int>(threadIdx.x)) * kUnit;
    if (start >= b.size) return;
    const int count = static_cast<int>(min(int64_t{kUnit}, b.size - start));
    const bool aligned = is_aligned(b.factor, start, 4) && is_aligned(b.increment, start, 4);
    float factor[kUnit];
    float increment[kUnit];
    load_unit(b.factor + start, count, aligned, factor);
    load_unit(b.increment + start, count, aligned, increment);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) factor[i] = keep * factor[i] + gain * increment[i];
    store_unit(b.factor + start, count, aligned, factor);
  }
}

// One block of one warp per problem.
__global__ void __launch_bounds__(kWarpSize)
    update_rms_kernel(const __grid_constant__ Grouped<RmsProblem> launch,
                      const __grid_constant__ Group group) {
  DYKAF_SHARED(double, scratch, [1]);
  const RmsProblem r = launch.problems[blockIdx.x];
  const MatrixOnDevice& p = group.matrices[r.matrix_idx];
  if (group.scalars[r.matrix_idx].active == 0) return;
  double sum[1] = {0.0};
  for (int i = static_cast<int>(threadIdx.x); i < r.num_partials; i += kWarpSize) {
    sum[0] += r.partials[static_cast<int64_t>(i) * r.stride];
  }
  block_sum(sum, scratch, kWarpSize);
  if (threadIdx.x != 0) return;
  if (r.norm != nullptr) {
    *r.norm = static_cast<float>(sqrt(sum[0]));
  } else {
    *p.update_rms = static_cast<float>(sqrt(sum[0] / static_cast<double>(p.m * p.n)));
  }
}

}  // namespace

int64_t element_tiles(int64_t m, int64_t n) {
  return ceil_div(m * ceil_div(n, kUnit), kUnitsPerBlock);
}

template <typename ElementProblem>
int launch_elements(const Grouped<ElementProblem>& launch, const Group& group, Stream stream) {
  return DYKAF_LAUNCH(elements_kernel<ElementProblem>, dim3(static_cast<unsigned>(launch.grid)),
                      dim3(kThreads), 0, static_cast<cudaStream_t>(stream), launch, group);
}

template int launch_elements(const Grouped<LoadProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<AdamProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<CompactAdamProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<ApplyProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<AdamWProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<BeyondProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<SquaresProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<NormalizeProblem>&, const Group&, Stream);
template int launch_elements(const Grouped<QuinticProblem>&, const Group&, Stream);

int launch_blend(const Grouped<BlendProblem>& launch, const Group& group, Stream stream) {
  return DYKAF_LAUNCH(blend_kernel, dim3(static_cast<unsigned>(launch.grid)), dim3(kThreads), 0,
                      static_cast<cudaStream_t>(stream), launch, group);
}

int launch_update_rms(const Grouped<RmsProblem>& launch, const Group& group, Stream stream) {
  return DYKAF_LAUNCH(update_rms_kernel, dim3(static_cast<unsigned>(launch.num)), dim3(kWarpSize),
                      0, static_cast<cudaStream_t>(stream), launch, group);
}

}  // namespace dykaf::cuda
