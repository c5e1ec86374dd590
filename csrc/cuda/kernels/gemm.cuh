// The grouped matrix multiplication: D = op(A) op(B), float32 in and out, on the tensor cores.
#pragma once

#include <type_traits>

#include "cuda/kernels/device/lookup.cuh"
#include "cuda/kernels/gemm_epilogue.cuh"
#include "cuda/kernels/gemm_fragments.cuh"

namespace dykaf::cuda {

// Sums in the tensor cores are truncated, with a bias that grows with their number: beyond this
// much of k they move to a second accumulator, which rounds to nearest.
inline constexpr int kDepthOfSum = 256;

// The tile of D that `tile` (from 0) stands for; symmetric results have those on and below the
// diagonal alone, row by row.
template <class Tile, bool kSymmetric>
DYKAF_DEVICE TilePlace locate_tile(const GemmProblem& p, int tile) {
  int i = 0;
  int j = 0;
  if constexpr (kSymmetric) {
    i = static_cast<int>((sqrtf(8.0f * static_cast<float>(tile) + 1.0f) - 1.0f) * 0.5f);
    // The root is inexact for large numbers.
    while ((i + 1) * (i + 2) / 2 <= tile) ++i;
    while (i * (i + 1) / 2 > tile) --i;
    j = tile - i * (i + 1) / 2;
  } else {
    const int tiles_n = (p.n + Tile::kN - 1) / Tile::kN;
    i = tile / tiles_n;
    j = tile % tiles_n;
  }
  TilePlace place;
  place.row0 = i * Tile::kM;
  place.col0 = j * Tile::kN;
  place.rows = min(p.m - place.row0, int{Tile::kM});
  place.cols = min(p.n - place.col0, int{Tile::kN});
  place.diagonal = kSymmetric && i == j;
  return place;
}

template <int kTilesM, int kTilesN>
DYKAF_DEVICE void add_and_clear(float (&total)[kTilesM][kTilesN][4],
                                float (&acc)[kTilesM][kTilesN][4]) {
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        total[i][j][r] += acc[i][j][r];
        acc[i][j][r] = 0.0f;
      }
    }
  }
}

// Fragments of a warp's 16 x 8 results to rows of the staged tile: lane 4 g + t holds columns 2 t
// and 2 t + 1 of rows g and g + 8.
template <int kTilesM, int kTilesN>
DYKAF_DEVICE void stage_results(const float (&acc)[kTilesM][kTilesN][4], float* staged, int stride,
                                int row, int col, int lane) {
  float* p = staged + (row + lane / 4) * stride + col + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      float* upper = p + 16 * i * stride + 8 * j;
      float* lower = upper + 8 * stride;
      *reinterpret_cast<float2*>(upper) = make_float2(acc[i][j][0], acc[i][j][1]);
      *reinterpret_cast<float2*>(lower) = make_float2(acc[i][j][2], acc[i][j][3]);
    }
  }
}

// One block per tile of D, Tile::kThreads threads; blocks are in the order of the problems. Each
// warp owns a kWarpM x kWarpN part. k runs in stages of kK through a ring of kStages buffers: a
// stage is read after this thread's copies of it have landed (wait) and those of all others
// (barrier), and refilled only after the barrier that ends its reading. Dynamic shared memory:
// SharedLayout::kBytes, first the ring, then the finished tile.
template <class Tile, GemmForm kForm, MatmulPrecision kPrecision>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    gemm_kernel(const __grid_constant__ GemmLaunch launch) {
  constexpr bool kTransposeA = transposes_a(kForm);
  constexpr bool kTransposeB = transposes_b(kForm);
  constexpr bool kSymmetric = is_symmetric(kForm);
  static_assert(!kSymmetric || Tile::kM == Tile::kN);
  using Layout = SharedLayout<Tile, kTransposeA, kTransposeB>;
  using TileA = typename Layout::TileA;
  using TileB = typename Layout::TileB;
  DYKAF_DYNAMIC_SHARED(shared);
  DYKAF_SHARED(double, scratch, [kNumSums * Tile::kThreads / kWarpSize]);

  const int tile = static_cast<int>(blockIdx.x);
  const GemmProblem p = launch.problems[find_problem(launch.problems, launch.num, tile)];
  if (launch.scalars != nullptr && launch.scalars[p.matrix_idx].active == 0) return;
  const TilePlace place = locate_tile<Tile, kSymmetric>(p, tile - p.tile_begin);

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const int warp_row = warp / Tile::kWarpsN * Tile::kWarpM;
  const int warp_col = warp % Tile::kWarpsN * Tile::kWarpN;

  SharedCarver carver(shared);
  float* ring_a = carver.take<float>(Tile::kStages * TileA::kSize);
  float* ring_b = carver.take<float>(Tile::kStages * TileB::kSize);
  const int cols_a = kTransposeA ? p.m : p.k;
  const int cols_b = kTransposeB ? p.k : p.n;
  TileLoader<TileA, Tile::kThreads> loader_a(
      p.A, kTransposeA ? p.k : p.m, cols_a, kTransposeA ? 0 : place.row0,
      kTransposeA ? place.row0 : 0, is_aligned(p.A, cols_a, 4), thread);
  TileLoader<TileB, Tile::kThreads> loader_b(
      p.B, kTransposeB ? p.n : p.k, cols_b, kTransposeB ? place.col0 : 0,
      kTransposeB ? 0 : place.col0, is_aligned(p.B, cols_b, 4), thread);
  const int num_stages = (p.k + Tile::kK - 1) / Tile::kK;
  int filled = 0;  // the ring's buffer that is filled next
  const auto load_stage = [&](int stage) {
    if (stage < num_stages) {
      loader_a.load(ring_a + filled * TileA::kSize, p.k - stage * Tile::kK);
      loader_b.load(ring_b + filled * TileB::kSize, p.k - stage * Tile::kK);
      filled = filled + 1 == Tile::kStages ? 0 : filled + 1;
    }
    cp_async_commit();  // an empty group too, so that groups count stages
  };

  float acc[Tile::kWarpM / 16][Tile::kWarpN / 8][4] = {};
  float total[Tile::kWarpM / 16][Tile::kWarpN / 8][4] = {};
  constexpr int kStagesOfSum = kDepthOfSum / Tile::kK;
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) load_stage(stage);
  int current = 0;
  for (int stage = 0; stage < num_stages; ++stage) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    load_stage(stage + Tile::kStages - 1);
    multiply_stage<kPrecision, Tile, TileA, TileB>(acc, ring_a + current * TileA::kSize,
                                                   ring_b + current * TileB::kSize, warp_row,
                                                   warp_col, lane);
    current = current + 1 == Tile::kStages ? 0 : current + 1;
    if constexpr (kPrecision == MatmulPrecision::kHighest) {
      if ((stage + 1) % kStagesOfSum == 0) add_and_clear(total, acc);
    }
  }
  if constexpr (kPrecision == MatmulPrecision::kHighest) add_and_clear(acc, total);
  // The groups that are still in flight are empty.
  __syncthreads();

  SharedCarver staged_carver(shared, kReuse);
  float* staged = staged_carver.take<float>(Layout::kStagedSize);
  stage_results(acc, staged, Layout::kStagedStride, warp_row, warp_col, lane);
  __syncthreads();
  TileEpilogue<Tile, kSymmetric> epilogue(launch, p, place, staged, Layout::kStagedStride);
  epilogue.apply(thread);
  if constexpr (kSymmetric) epilogue.mirror(thread);
  if (p.partials != nullptr) {
    double sums[kNumSums];
#pragma unroll
    for (int i = 0; i < kNumSums; ++i) sums[i] = epilogue.sums[i];
    block_sum(sums, scratch, Tile::kThreads);
    if (thread == 0) {
      double* partials = p.partials + static_cast<int64_t>(tile - p.tile_begin) * kNumSums;
#pragma unroll
      for (int i = 0; i < kNumSums; ++i) partials[i] = sums[i];
    }
  }
}

template <class Tile, GemmForm kForm, MatmulPrecision kPrecision>
int launch_gemm_form(const GemmLaunch& launch, Stream stream) {
  using Layout = SharedLayout<Tile, transposes_a(kForm), transposes_b(kForm)>;
  return DYKAF_LAUNCH((gemm_kernel<Tile, kForm, kPrecision>),
                      dim3(static_cast<unsigned>(launch.grid)), dim3(Tile::kThreads),
                      Layout::kBytes, static_cast<cudaStream_t>(stream), launch);
}

template <class Tile, MatmulPrecision kPrecision>
int launch_gemm_tile(GemmForm form, const GemmLaunch& launch, Stream stream) {
  switch (form) {
    case GemmForm::kNN:
      return launch_gemm_form<Tile, GemmForm::kNN, kPrecision>(launch, stream);
    case GemmForm::kTN:
      return launch_gemm_form<Tile, GemmForm::kTN, kPrecision>(launch, stream);
    case GemmForm::kNT:
      return launch_gemm_form<Tile, GemmForm::kNT, kPrecision>(launch, stream);
    case GemmForm::kSymmetricNT:
    case GemmForm::kSymmetricTN:
      break;
  }
  if constexpr (Tile::kM == Tile::kN) {
    return form == GemmForm::kSymmetricNT
               ? launch_gemm_form<Tile, GemmForm::kSymmetricNT, kPrecision>(launch, stream)
               : launch_gemm_form<Tile, GemmForm::kSymmetricTN, kPrecision>(launch, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

// kHighest has two accumulators, for which a larger warp tile has no registers.
template <MatmulPrecision kPrecision>
using LargeTileOf =
    std::conditional_t<kPrecision == MatmulPrecision::kHighest, LargeTile, LargeWarpTile>;

template <MatmulPrecision kPrecision>
int launch_gemm_precision(GemmForm form, TileClass tile_class, const GemmLaunch& launch,
                          Stream stream) {
  switch (tile_class) {
    case TileClass::kLarge:
      return launch_gemm_tile<LargeTileOf<kPrecision>, kPrecision>(form, launch, stream);
    case TileClass::kMedium:
      return launch_gemm_tile<MediumTile, kPrecision>(form, launch, stream);
    case TileClass::kWide:
      return launch_gemm_tile<WideTile, kPrecision>(form, launch, stream);
    case TileClass::kTall:
      return launch_gemm_tile<TallTile, kPrecision>(form, launch, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace dykaf::cuda
