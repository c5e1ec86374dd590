// What a block does with its finished tile, which lies in shared memory: units of eight columns,
// rows in order, so that global memory is met in whole 16-byte pieces.
#pragma once

#include "cuda/kernels/device/elements.cuh"
#include "cuda/kernels/device/reduce.cuh"
#include "cuda/kernels/gemm.h"
#include "cuda/kernels/gemm_tile.cuh"

namespace dykaf::cuda {

// The part of D that a block owns.
struct TilePlace {
  int row0;
  int col0;
  int rows;  // inside the matrix
  int cols;
  // Of a symmetric result: a tile on the diagonal, of which the lower triangle counts.
  bool diagonal;
};

template <class Tile, bool kSymmetric>
class TileEpilogue {
 public:
  DYKAF_DEVICE TileEpilogue(const GemmLaunch& launch, const GemmProblem& problem,
                            const TilePlace& place, const float* staged, int staged_stride)
      : launch_(launch),
        p_(problem),
        place_(place),
        staged_(staged),
        stride_(staged_stride),
        inverse_(is_newton_schulz(problem.epilogue) ? inverse_bound(problem.bound) : 1.0f) {}

  // Applies the epilogue to every unit of this thread and stores what is to be stored.
  DYKAF_DEVICE void apply(int thread) {
    constexpr int kUnitsPerRow = Tile::kN / kUnit;
    // A unit is aligned in all arrays of floats or in none of them that matters: they start at
    // multiples of n from 16-byte aligned allocations.
    const bool aligned = arrays_aligned();
    for (int unit = thread; unit < Tile::kM * kUnitsPerRow; unit += Tile::kThreads) {
      const int row = unit / kUnitsPerRow;
      const int col = unit % kUnitsPerRow * kUnit;
      const int end = place_.diagonal ? min(place_.cols, row + 1) : place_.cols;
      const int count = min(kUnit, end - col);
      if (row < place_.rows && count > 0) apply_unit(row, col, count, aligned);
    }
  }

  // Copies the strict lower triangle to the upper one: D[col][row] = D[row][col].
  DYKAF_DEVICE void mirror(int thread) const {
    for (int i = thread; i < Tile::kM * Tile::kN; i += Tile::kThreads) {
      const int col = i / Tile::kM;
      const int row = i % Tile::kM;  // fastest: neighbours in memory
      if (row < place_.rows && col < place_.cols && (!place_.diagonal || col < row)) {
        const int64_t place = static_cast<int64_t>(place_.col0 + col) * p_.n + place_.row0 + row;
        const float product = staged_[row * stride_ + col];
        p_.D[place] =
            p_.epilogue == Epilogue::kQuadratic ? quadratic(p_.C[place], product) : product;
      }
    }
  }

  // The sums of this thread's entries; those of a symmetric result count for both places.
  float sums[kNumSums] = {};

 private:
  DYKAF_DEVICE bool arrays_aligned() const {
    bool aligned = is_aligned(p_.D, p_.n, 4) && is_aligned(p_.C, p_.n, 4);
    if (p_.epilogue == Epilogue::kAdam) {
      const MatrixOnDevice& matrix = launch_.matrices[p_.matrix_idx];
      aligned = aligned && is_aligned(matrix.exp_avg, p_.n, 4) &&
                is_aligned(matrix.exp_avg_sq, p_.n, 4) && is_aligned(p_.update, p_.n, 4);
    }
    return aligned;
  }

  DYKAF_DEVICE void apply_unit(int row, int col, int count, bool aligned) {
    const int64_t start = static_cast<int64_t>(place_.row0 + row) * p_.n + place_.col0 + col;
    // Staged rows are whole, and start at multiples of 16 bytes.
    const float* staged = staged_ + row * stride_ + col;
    const float4 lo = *reinterpret_cast<const float4*>(staged);
    const float4 hi = *reinterpret_cast<const float4*>(staged + 4);
    const float acc[kUnit] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};

    switch (p_.epilogue) {
      case Epilogue::kStore:
        store_unit(p_.D + start, count, aligned, acc);
        break;
      case Epilogue::kAdam:
        adam(start, count, aligned, acc);
        break;
      case Epilogue::kParameter:
        parameter(start, count, acc);
        break;
      case Epilogue::kSums:
        store_unit(p_.D + start, count, aligned, acc);
        add_sums(start, row, col, count, aligned, acc);
        break;
      case Epilogue::kInner:
        add_sums(start, row, col, count, aligned, acc);
        break;
      case Epilogue::kQuadratic:
      case Epilogue::kQuintic:
      case Epilogue::kLastQuintic:
        newton_schulz(start, count, aligned, acc);
        break;
    }
  }

  DYKAF_DEVICE float quadratic(float c, float product) const {
    return static_cast<float>(NewtonSchulz::kB) * inverse_ * c +
           static_cast<float>(NewtonSchulz::kC) * inverse_ * inverse_ * product;
  }

  DYKAF_DEVICE float last_scale() const {
    return update_scale(static_cast<float>(max(p_.m, p_.n)), launch_.adam->full_rms,
                        launch_.matrices[p_.matrix_idx].update_rms);
  }

  DYKAF_DEVICE void newton_schulz(int64_t start, int count, bool aligned,
                                  const float (&product)[kUnit]) {
    const float scale =
        sqrtf(inverse_) * (p_.epilogue == Epilogue::kLastQuintic ? last_scale() : 1.0f);
    float c[kUnit];
    float d[kUnit];
    load_unit(p_.C + start, count, aligned, c);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      d[i] = p_.epilogue == Epilogue::kQuadratic ? quadratic(c[i], product[i])
                                                 : quintic(c[i], product[i], scale);
      if (i < count) sums[0] += d[i] * d[i];
    }
    store_unit(p_.D + start, count, aligned, d);
  }

  DYKAF_DEVICE void adam(int64_t start, int count, bool aligned, const float (&h)[kUnit]) {
    const MatrixOnDevice& matrix = launch_.matrices[p_.matrix_idx];
    float update[kUnit];
    adam_unit_(matrix, launch_.scalars[p_.matrix_idx], *launch_.adam, start, count, aligned, h,
               update);
    store_unit(p_.D + start, count, aligned, h);
    store_unit(p_.update + start, count, aligned, update);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i < count) sums[0] += update[i] * update[i];
    }
  }

  DYKAF_DEVICE void parameter(int64_t start, int count, const float (&update)[kUnit]) {
    const MatrixOnDevice& matrix = launch_.matrices[p_.matrix_idx];
    const bool aligned = is_aligned(matrix.param, p_.n, element_size(matrix.dtype));
    const bool master_aligned = is_aligned(matrix.master, p_.n, 4);
    apply_unit_<Extent::kWhole>(matrix, launch_.scalars[p_.matrix_idx], start, count, aligned,
                                master_aligned, update);
  }

  DYKAF_DEVICE void add_sums(int64_t start, int row, int col, int count, bool aligned,
                             const float (&d)[kUnit]) {
    float c[kUnit] = {};
    if (p_.C != nullptr) load_unit(p_.C + start, count, aligned, c);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i >= count) continue;
      const bool both_places = kSymmetric && !(place_.diagonal && col + i == row);
      const float weight = both_places ? 2.0f : 1.0f;
      sums[0] += weight * c[i] * c[i];
      sums[1] += weight * c[i] * d[i];
      sums[2] += weight * d[i] * d[i];
    }
  }

  const GemmLaunch& launch_;
  const GemmProblem& p_;
  const TilePlace place_;
  const float* staged_;
  int stride_;
  float inverse_;  // 1 / t^2 of Newton-Schulz
};

}  // namespace dykaf::cuda
