// From shared memory through the tensor cores: the multiplications of one warp.
#pragma once

#include "cuda/kernels/gemm_tile.cuh"
#include "dykaf/cuda_ops.h"

namespace dykaf::cuda {

inline constexpr uint32_t kTf32Mask = 0xffffe000u;

// 16 rows x 8 of k of op(A) from (row, k), as the bits of floats.
template <class Shared>
DYKAF_DEVICE void load_fragment_a(uint32_t (&a)[4], const float* shared, int row, int k, int lane) {
  if constexpr (Shared::kAlongK) {
    ldmatrix_x4(a, shared + (row + lane % 16) * Shared::kStride + k + lane / 16 * 4);
  } else {
    const float* p = shared + (k + lane % 4) * Shared::kStride + row + lane / 4;
    a[0] = __float_as_uint(load_shared(p));
    a[1] = __float_as_uint(load_shared(p + 8));
    a[2] = __float_as_uint(load_shared(p + 4 * Shared::kStride));
    a[3] = __float_as_uint(load_shared(p + 4 * Shared::kStride + 8));
  }
}

// 8 of k x 16 columns of op(B) from (k, col): two fragments of 8 columns.
template <class Shared>
DYKAF_DEVICE void load_fragments_b(uint32_t (&b0)[2], uint32_t (&b1)[2], const float* shared,
                                   int col, int k, int lane) {
  if constexpr (Shared::kAlongK) {
    uint32_t r[4];
    ldmatrix_x4(r,
                shared + (col + lane % 8 + lane / 16 * 8) * Shared::kStride + k + lane / 8 % 2 * 4);
    b0[0] = r[0];
    b0[1] = r[1];
    b1[0] = r[2];
    b1[1] = r[3];
  } else {
    const float* p = shared + (k + lane % 4) * Shared::kStride + col + lane / 4;
    b0[0] = __float_as_uint(load_shared(p));
    b0[1] = __float_as_uint(load_shared(p + 4 * Shared::kStride));
    b1[0] = __float_as_uint(load_shared(p + 8));
    b1[1] = __float_as_uint(load_shared(p + 4 * Shared::kStride + 8));
  }
}

// x = big + small + O(2^-22 x), both of them TF32 numbers to the tensor cores, which drop the low
// 13 bits: of small, whose sign is as good as random, that is the last bit of x at most. NaN and
// infinity stay NaN in small.
DYKAF_DEVICE void split_tf32(uint32_t& x, uint32_t& small) {
  const float value = __uint_as_float(x);
  x = (x + 0x1000u) & kTf32Mask;
  small = __float_as_uint(value - __uint_as_float(x));
}

// The fragments of a warp's tile at one step of k.
template <class Tile, class TileA, class TileB>
struct WarpFragments {
  static constexpr int kTilesM = Tile::kWarpM / 16;
  static constexpr int kTilesN = Tile::kWarpN / 8;
  static_assert(kTilesN % 2 == 0);

  DYKAF_DEVICE void load(const float* shared_a, const float* shared_b, int row, int col, int k,
                         int lane) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      load_fragment_a<TileA>(a[i], shared_a, row + 16 * i, k, lane);
    }
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      load_fragments_b<TileB>(b[j], b[j + 1], shared_b, col + 8 * j, k, lane);
    }
  }

  uint32_t a[kTilesM][4];
  uint32_t b[kTilesN][2];
};

template <int kNum, int kRegisters>
DYKAF_DEVICE void round_fragments(uint32_t (&x)[kNum][kRegisters]) {
#pragma unroll
  for (int i = 0; i < kNum; ++i) {
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) x[i][r] = round_tf32(__uint_as_float(x[i][r]));
  }
}

template <int kNum, int kRegisters>
DYKAF_DEVICE void split_fragments(uint32_t (&x)[kNum][kRegisters],
                                  uint32_t (&small)[kNum][kRegisters]) {
#pragma unroll
  for (int i = 0; i < kNum; ++i) {
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) split_tf32(x[i][r], small[i][r]);
  }
}

// Two TF32 fragments of 8 of k as one bfloat16 fragment of 16. The tensor core then sees k in the
// order 0 4 1 5 2 6 3 7, in both operands alike, so that the sum is the same.
template <int kNum, int kRegisters>
DYKAF_DEVICE void pack_fragments(uint32_t (&packed)[kNum][kRegisters],
                                 const uint32_t (&lo)[kNum][kRegisters],
                                 const uint32_t (&hi)[kNum][kRegisters]) {
  constexpr int kHalf = kRegisters / 2;
#pragma unroll
  for (int i = 0; i < kNum; ++i) {
#pragma unroll
    for (int r = 0; r < kHalf; ++r) {
      packed[i][r] = pack_bf16(__uint_as_float(lo[i][r]), __uint_as_float(lo[i][r + kHalf]));
      packed[i][r + kHalf] =
          pack_bf16(__uint_as_float(hi[i][r]), __uint_as_float(hi[i][r + kHalf]));
    }
  }
}

// acc += the product of one stage. kHighest: 3xTF32, which leaves out small times small alone.
template <MatmulPrecision kPrecision, class Tile, class TileA, class TileB>
DYKAF_DEVICE void multiply_stage(float (&acc)[Tile::kWarpM / 16][Tile::kWarpN / 8][4],
                                 const float* shared_a, const float* shared_b, int row, int col,
                                 int lane) {
  constexpr int kStep = kPrecision == MatmulPrecision::kMedium ? 16 : 8;
  using Fragments = WarpFragments<Tile, TileA, TileB>;
#pragma unroll
  for (int k = 0; k < Tile::kK; k += kStep) {
    Fragments x;
    x.load(shared_a, shared_b, row, col, k, lane);
    if constexpr (kPrecision == MatmulPrecision::kMedium) {
      Fragments y;
      y.load(shared_a, shared_b, row, col, k + 8, lane);
      Fragments packed;
      pack_fragments(packed.a, x.a, y.a);
      pack_fragments(packed.b, x.b, y.b);
      mma_tile_bf16(acc, packed.a, packed.b);
    } else if constexpr (kPrecision == MatmulPrecision::kHigh) {
      round_fragments(x.a);
      round_fragments(x.b);
      mma_tile_tf32(acc, x.a, x.b);
    } else {
      Fragments small;
      split_fragments(x.a, small.a);
      split_fragments(x.b, small.b);
      mma_tile_tf32(acc, small.a, x.b);
      mma_tile_tf32(acc, x.a, small.b);
      mma_tile_tf32(acc, x.a, x.b);
    }
  }
}

}  // namespace dykaf::cuda
