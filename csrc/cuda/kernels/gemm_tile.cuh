// The shared-memory side of a multiplication: block shapes, padded tiles, asynchronous loads.
#pragma once

#include "cuda/kernels/device/ptx.cuh"

namespace dykaf::cuda {

template <int kM_, int kN_, int kK_, int kWarpM_, int kWarpN_, int kStages_, int kMinBlocks_>
struct TileShape {
  static constexpr int kM = kM_;
  static constexpr int kN = kN_;
  static constexpr int kK = kK_;
  static constexpr int kWarpM = kWarpM_;
  static constexpr int kWarpN = kWarpN_;
  static constexpr int kStages = kStages_;
  static constexpr int kMinBlocks = kMinBlocks_;  // per multiprocessor, for the register budget
  static constexpr int kWarpsN = kN / kWarpN;
  static constexpr int kThreads = 32 * (kM / kWarpM) * kWarpsN;
};

using LargeTile = TileShape<128, 128, 16, 64, 32, 4, 1>;
// Where one accumulator is enough: larger warp tiles read each operand from shared memory less
// often.
using LargeWarpTile = TileShape<128, 128, 16, 64, 64, 4, 2>;
using MediumTile = TileShape<64, 64, 32, 32, 32, 3, 3>;
using WideTile = TileShape<16, 64, 64, 16, 16, 3, 2>;
using TallTile = TileShape<64, 16, 64, 16, 16, 3, 3>;

// One stage of an operand as it lies in memory: along k, or across it. The padding keeps ldmatrix
// (along k: a stride of 4 mod 8 words) and single loads (across: 8 mod 32) free of bank conflicts.
template <int kLength, int kDepth, bool kAlongK_>
struct SharedTile {
  static constexpr bool kAlongK = kAlongK_;
  static constexpr int kRows = kAlongK ? kLength : kDepth;
  static constexpr int kCols = kAlongK ? kDepth : kLength;
  static constexpr int kStride = kCols + (kAlongK ? 4 : 8);
  static constexpr int kSize = kRows * kStride;
};

template <class Tile, bool kTransposeA, bool kTransposeB>
struct SharedLayout {
  using TileA = SharedTile<Tile::kM, Tile::kK, !kTransposeA>;
  using TileB = SharedTile<Tile::kN, Tile::kK, kTransposeB>;
  static constexpr int kStagedStride = Tile::kN + 4;
  static constexpr int kStagedSize = Tile::kM * kStagedStride;
  static constexpr int kLoopSize = Tile::kStages * (TileA::kSize + TileB::kSize);
  static constexpr size_t kBytes =
      sizeof(float) * (kLoopSize > kStagedSize ? kLoopSize : kStagedSize);
};

// Streams windows of a row-major rows x cols matrix along k into shared memory, zeros outside. What
// does not change with k is computed once, here.
template <class Shared, int kThreads>
class TileLoader {
 public:
  // The first window starts at (row0, col0). `vectorized`: rows start at multiples of 16 bytes.
  DYKAF_DEVICE TileLoader(const float* matrix, int rows, int cols, int row0, int col0,
                          bool vectorized, int thread)
      : matrix_(matrix),
        stride_(cols),
        row_(thread / kChunks),
        col_(thread % kChunks * kChunk),
        vectorized_(vectorized) {
    window_ = matrix + static_cast<int64_t>(row0 + row_) * stride_ + (col0 + col_);
    if constexpr (Shared::kAlongK) {
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        rows_inside_ |= (row0 + row_ + i * kRowStep < rows ? 1u : 0u) << i;
      }
    } else {
      cols_inside_ = max(0, min(kChunk, cols - (col0 + col_)));
    }
  }

  // Starts the copy of the next window to `shared`; k_left > 0 entries of k are left from its
  // start.
  DYKAF_DEVICE void load(float* shared, int k_left) {
    shared += row_ * Shared::kStride + col_;
    if (vectorized_) {
      // Rows are whole chunks here: a chunk is inside or outside as a whole.
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        cp_async16_or_zeros(shared + i * kRowStep * Shared::kStride,
                            window_ + i * kRowStep * stride_, num_inside(i, k_left) > 0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        const int count = num_inside(i, k_left);
        const float* source = window_ + i * kRowStep * stride_;
        float* target = shared + i * kRowStep * Shared::kStride;
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          cp_async4(target + j, j < count ? source + j : matrix_, j < count ? 4 : 0);
        }
      }
    }
    window_ += Shared::kAlongK ? int64_t{Shared::kCols} : Shared::kRows * stride_;
  }

 private:
  static constexpr int kChunk = 4;
  static constexpr int kChunks = Shared::kCols / kChunk;
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kRowsPerThread = Shared::kRows / kRowStep;
  static_assert(kThreads % kChunks == 0 && Shared::kRows % kRowStep == 0);

  // How many of the chunk's entries lie inside the matrix.
  DYKAF_DEVICE int num_inside(int i, int k_left) const {
    if constexpr (Shared::kAlongK) {
      return (rows_inside_ >> i & 1u) != 0 ? max(0, min(kChunk, k_left - col_)) : 0;
    }
    return row_ + i * kRowStep < k_left ? cols_inside_ : 0;
  }

  const float* matrix_;
  const float* window_;
  int64_t stride_;
  int row_;
  int col_;
  unsigned rows_inside_ = 0;
  int cols_inside_ = 0;
  bool vectorized_;
};

}  // namespace dykaf::cuda
