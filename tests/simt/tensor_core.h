// Tensor-core instructions: ldmatrix and mma on the fragments of PTX ("Matrix fragments for
// mma.m16n8k8 / m16n8k16"), and the conversions of their operands.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "collectives.h"

namespace simt {

// The low 13 bits of a tf32 operand are ignored.
inline constexpr uint32_t kTf32Mask = 0xFFFFE000u;

inline constexpr int kMmaRows = 16;
inline constexpr int kMmaCols = 8;

// Position of a lane in the fragments: four lanes share a row of A and D, or a column of B.
struct FragmentLane {
  int group;
  int member;
};

SIMT_UNCHECKED inline FragmentLane fragment_lane(int lane_idx) {
  return {lane_idx / 4, lane_idx % 4};
}

SIMT_UNCHECKED inline float tf32_value(uint32_t bits) {
  return std::bit_cast<float>(bits & kTf32Mask);
}
SIMT_UNCHECKED inline float low_bf16(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
SIMT_UNCHECKED inline float high_bf16(uint32_t pair) {
  return std::bit_cast<float>(pair & 0xFFFF0000u);
}

// Tiles of all lanes: d is [MT][NT][4], a is [MT][4], b is [NT][2].
struct MmaOperands {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

SIMT_UNCHECKED inline const MmaOperands& mma_operands(const Fiber& fiber) {
  return *static_cast<const MmaOperands*>(fiber.operands);
}

struct Tf32 {
  static constexpr int kDepth = 8;

  SIMT_UNCHECKED static void load_a(float (&a)[kMmaRows][kDepth], const Fiber* warp, int tile) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const auto [group, member] = fragment_lane(lane);
      const uint32_t* fragment = mma_operands(warp[lane]).a + 4 * tile;
      a[group][member] = tf32_value(fragment[0]);
      a[group + 8][member] = tf32_value(fragment[1]);
      a[group][member + 4] = tf32_value(fragment[2]);
      a[group + 8][member + 4] = tf32_value(fragment[3]);
    }
  }

  SIMT_UNCHECKED static void load_b(float (&b)[kDepth][kMmaCols], const Fiber* warp, int tile) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const auto [group, member] = fragment_lane(lane);
      const uint32_t* fragment = mma_operands(warp[lane]).b + 2 * tile;
      b[member][group] = tf32_value(fragment[0]);
      b[member + 4][group] = tf32_value(fragment[1]);
    }
  }
};

struct Bf16 {
  static constexpr int kDepth = 16;

  SIMT_UNCHECKED static void load_a(float (&a)[kMmaRows][kDepth], const Fiber* warp, int tile) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const auto [group, member] = fragment_lane(lane);
      const uint32_t* fragment = mma_operands(warp[lane]).a + 4 * tile;
      for (int i = 0; i < 4; ++i) {
        const int row = group + 8 * (i % 2);
        const int k = 2 * member + 8 * (i / 2);
        a[row][k] = low_bf16(fragment[i]);
        a[row][k + 1] = high_bf16(fragment[i]);
      }
    }
  }

  SIMT_UNCHECKED static void load_b(float (&b)[kDepth][kMmaCols], const Fiber* warp, int tile) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const auto [group, member] = fragment_lane(lane);
      const uint32_t* fragment = mma_operands(warp[lane]).b + 2 * tile;
      for (int i = 0; i < 2; ++i) {
        const int k = 2 * member + 8 * i;
        b[k][group] = low_bf16(fragment[i]);
        b[k + 1][group] = high_bf16(fragment[i]);
      }
    }
  }
};

// Products of tf32 or bf16 operands are exact in float: only the additions round, and whether the
// compiler contracts them makes no difference.
template <int K>
SIMT_UNCHECKED void multiply_nearest(float (&d)[kMmaRows][kMmaCols], const float (&a)[kMmaRows][K],
                                     const float (&b)[K][kMmaCols]) {
  using Row [[gnu::vector_size(sizeof(float) * kMmaCols)]] = float;
  for (int row = 0; row < kMmaRows; ++row) {
    Row sum;
    memcpy(&sum, d[row], sizeof sum);
    for (int k = 0; k < K; ++k) {
      Row b_row;
      memcpy(&b_row, b[k], sizeof b_row);
      sum += a[row][k] * b_row;
    }
    memcpy(d[row], &sum, sizeof sum);
  }
}

// A model of the hardware's adder: the sum over k and the accumulator, truncated once.
template <int K>
SIMT_UNCHECKED void multiply_toward_zero(float (&d)[kMmaRows][kMmaCols],
                                         const float (&a)[kMmaRows][K],
                                         const float (&b)[K][kMmaCols]) {
  for (int row = 0; row < kMmaRows; ++row) {
    for (int col = 0; col < kMmaCols; ++col) {
      double sum = d[row][col];
      for (int k = 0; k < K; ++k) {
        sum += static_cast<double>(a[row][k]) * b[k][col];
      }
      float rounded = static_cast<float>(sum);
      if (std::fabs(static_cast<double>(rounded)) > std::fabs(sum)) {
        rounded = std::nextafter(rounded, 0.0f);
      }
      d[row][col] = rounded;
    }
  }
}

template <int K>
SIMT_UNCHECKED void mma(Worker& worker, Fiber* warp, int tile, const float (&a)[kMmaRows][K],
                        const float (&b)[K][kMmaCols]) {
  float d[kMmaRows][kMmaCols];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto [group, member] = fragment_lane(lane);
    const float* fragment = mma_operands(warp[lane]).d + 4 * tile;
    d[group][2 * member] = fragment[0];
    d[group][2 * member + 1] = fragment[1];
    d[group + 8][2 * member] = fragment[2];
    d[group + 8][2 * member + 1] = fragment[3];
  }
  if (worker.round_toward_zero) {
    multiply_toward_zero<K>(d, a, b);
  } else {
    multiply_nearest<K>(d, a, b);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto [group, member] = fragment_lane(lane);
    float* fragment = mma_operands(warp[lane]).d + 4 * tile;
    fragment[0] = d[group][2 * member];
    fragment[1] = d[group][2 * member + 1];
    fragment[2] = d[group + 8][2 * member];
    fragment[3] = d[group + 8][2 * member + 1];
  }
  ++worker.stats.mma;
}

template <typename Type, int MT, int NT>
SIMT_UNCHECKED void finish_mma_tile(Worker& worker, Fiber* warp, uint32_t) {
  float b[NT][Type::kDepth][kMmaCols];
  for (int j = 0; j < NT; ++j) {
    Type::load_b(b[j], warp, j);
  }
  for (int i = 0; i < MT; ++i) {
    float a[kMmaRows][Type::kDepth];
    Type::load_a(a, warp, i);
    for (int j = 0; j < NT; ++j) {
      mma<Type::kDepth>(worker, warp, i * NT + j, a, b[j]);
    }
  }
}

struct LdmatrixOperands {
  uint32_t* result;
  const void* row;
  uint32_t words[4];  // the row
};

// Matrix m comes from the rows that lanes 8m to 8m+7 point to. Each lane receives, of every matrix,
// the word `member` of row `group`.
SIMT_UNCHECKED inline void finish_ldmatrix(Worker& worker, Fiber* warp, uint32_t) {
  constexpr int kRows = 8;
  constexpr unsigned kRowBytes = 16;
  constexpr unsigned kRowsPerBankCycle = 8;
  ++worker.stats.ldmatrix;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const Fiber* rows = warp + matrix * kRows;
    unsigned used_banks = 0;
    for (int i = 0; i < kRows; ++i) {
      const void* row = static_cast<LdmatrixOperands*>(rows[i].operands)->row;
      const auto slot = reinterpret_cast<uintptr_t>(row) / kRowBytes % kRowsPerBankCycle;
      const unsigned banks = 1u << slot;
      worker.stats.ldmatrix_conflicts += (used_banks & banks) != 0;
      used_banks |= banks;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const auto [group, member] = fragment_lane(lane);
      const auto* source = static_cast<LdmatrixOperands*>(rows[group].operands);
      static_cast<LdmatrixOperands*>(warp[lane].operands)->result[matrix] = source->words[member];
    }
  }
}

inline uint32_t bf16_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) {
    return 0x7FFF;
  }
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

}  // namespace simt

namespace dykaf::cuda {

// Each lane reads its own row when it arrives, so that a missing barrier shows as for any load.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row,
                        simt::Location where = simt::Location::current()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    simt::fail("ldmatrix: misaligned row address:", simt::enter_operation("ldmatrix.x4", where));
  }
  simt::LdmatrixOperands operands{r, row, {}};
  memcpy(operands.words, row, sizeof operands.words);
  simt::meet("ldmatrix.x4", simt::kFullMask, &operands, simt::finish_ldmatrix,
             simt::MemoryOrder::kNone, where);
}

// Nearest, ties away from zero. PTX leaves the low 13 bits of the result open: shuffled seeds make
// them dirty, so that using the result as a float without a mask is noticed.
inline uint32_t round_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) {
    return 0x7FFFFFFF;
  }
  if (std::isinf(x)) {
    return bits;
  }
  const uint32_t rounded = (bits + 0x1000) & simt::kTf32Mask;
  const bool is_dirty = simt::options().seed >= 2;
  return rounded | (is_dirty ? bits * 2654435761u >> 19 : 0);
}

inline uint32_t pack_bf16(float lo, float hi) {
  return simt::bf16_bits(lo) | simt::bf16_bits(hi) << 16;
}

template <int MT, int NT>
void mma_tile_tf32(float (&d)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2],
                   simt::Location where = simt::Location::current()) {
  simt::MmaOperands operands{&d[0][0][0], &a[0][0], &b[0][0]};
  simt::meet("mma.m16n8k8.tf32", simt::kFullMask, &operands,
             simt::finish_mma_tile<simt::Tf32, MT, NT>, simt::MemoryOrder::kNone, where);
}

template <int MT, int NT>
void mma_tile_bf16(float (&d)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2],
                   simt::Location where = simt::Location::current()) {
  simt::MmaOperands operands{&d[0][0][0], &a[0][0], &b[0][0]};
  simt::meet("mma.m16n8k16.bf16", simt::kFullMask, &operands,
             simt::finish_mma_tile<simt::Bf16, MT, NT>, simt::MemoryOrder::kNone, where);
}

}  // namespace dykaf::cuda
