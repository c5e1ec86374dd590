// Correct kernels, each checked against plain C++ that states the same thing another way.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "test_check.h"

namespace {

using namespace dykaf::cuda;

// A layout of CUTLASS: the place in a column-major matrix of value `value_idx` of a lane. The
// strides of MMA_Traits state the fragments independently of the PTX tables.
struct FragmentLayout {
  int member_stride;
  int group_stride;
  int value_strides[3];  // of the bits of value_idx

  int operator()(int lane, int value_idx) const {
    int offset = lane % 4 * member_stride + lane / 4 * group_stride;
    for (int bit = 0; bit < 3; ++bit) {
      offset += (value_idx >> bit & 1) * value_strides[bit];
    }
    return offset;
  }
};

struct MmaShape {
  int k;
  int values_per_register;
  FragmentLayout a;  // 16 x k
  FragmentLayout b;  // 8 x k
};

constexpr FragmentLayout kAccumulator{32, 1, {16, 8, 0}};  // 16 x 8
constexpr MmaShape kTf32Shape{8, 1, {16, 1, {8, 64, 0}}, {8, 1, {32, 0, 0}}};
constexpr MmaShape kBf16Shape{16, 2, {32, 1, {16, 8, 128}}, {16, 1, {8, 64, 0}}};

template <bool kIsBf16>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  constexpr int kTilesM = 2;
  constexpr int kTilesN = 3;
  const int lane = threadIdx.x;
  uint32_t a_fragment[kTilesM][4];
  uint32_t b_fragment[kTilesN][2];
  float d_fragment[kTilesM][kTilesN][4];
  for (int i = 0; i < kTilesM; ++i) {
    for (int r = 0; r < 4; ++r) {
      a_fragment[i][r] = a[(i * 32 + lane) * 4 + r];
    }
  }
  for (int j = 0; j < kTilesN; ++j) {
    for (int r = 0; r < 2; ++r) {
      b_fragment[j][r] = b[(j * 32 + lane) * 2 + r];
    }
  }
  for (int i = 0; i < kTilesM * kTilesN * 4; ++i) {
    (&d_fragment[0][0][0])[i] = d[lane * kTilesM * kTilesN * 4 + i];
  }
  if constexpr (kIsBf16) {
    mma_tile_bf16(d_fragment, a_fragment, b_fragment);
  } else {
    mma_tile_tf32(d_fragment, a_fragment, b_fragment);
  }
  for (int i = 0; i < kTilesM * kTilesN * 4; ++i) {
    d[lane * kTilesM * kTilesN * 4 + i] = (&d_fragment[0][0][0])[i];
  }
}

// Registers of fragments of column-major matrices, of `num_registers` for each lane and tile.
std::vector<uint32_t> to_fragments(const std::vector<float>& matrices, int matrix_size,
                                   int num_registers, const MmaShape& shape,
                                   const FragmentLayout& layout, std::mt19937& random) {
  std::vector<uint32_t> registers;
  for (size_t tile = 0; tile < matrices.size(); tile += matrix_size) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < num_registers; ++r) {
        const float low = matrices[tile + layout(lane, r * shape.values_per_register)];
        if (shape.values_per_register == 1) {
          registers.push_back(std::bit_cast<uint32_t>(low) | (random() & 0x1FFF));
        } else {
          registers.push_back(pack_bf16(low, matrices[tile + layout(lane, 2 * r + 1)]));
        }
      }
    }
  }
  return registers;
}

// Normal numbers with 8 significant bits: exact in bf16 and in tf32.
std::vector<float> short_normals(int count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) {
    value = std::bit_cast<float>(std::bit_cast<uint32_t>(normal(random)) & 0xFFFF0000u);
  }
  return values;
}

enum class Rounding { kNearest, kTowardZero };

template <bool kIsBf16>
void test_mma(const char* name, Rounding rounding) {
  constexpr MmaShape kShape = kIsBf16 ? kBf16Shape : kTf32Shape;
  constexpr int kTilesM = 2;
  constexpr int kTilesN = 3;
  std::mt19937 random(1);
  const auto a = short_normals(kTilesM * 16 * kShape.k, random);
  const auto b = short_normals(kTilesN * 8 * kShape.k, random);
  const auto c = short_normals(kTilesM * kTilesN * 128, random);
  const auto a_registers = to_fragments(a, 16 * kShape.k, 4, kShape, kShape.a, random);
  const auto b_registers = to_fragments(b, 8 * kShape.k, 2, kShape, kShape.b, random);
  std::vector<float> d(c.size());
  const auto place = [](int lane, int tile, int i) {
    return (lane * kTilesM * kTilesN + tile) * 4 + i;
  };
  const auto for_each_value = [&](auto&& body) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int tile = 0; tile < kTilesM * kTilesN; ++tile) {
        for (int i = 0; i < 4; ++i) {
          body(tile, tile * 128 + kAccumulator(lane, i), place(lane, tile, i));
        }
      }
    }
  };
  for_each_value([&](int, int at, int where) { d[where] = c[at]; });

  simt::options().round_toward_zero = rounding == Rounding::kTowardZero;
  simt::reset();
  DYKAF_LAUNCH((mma_kernel<kIsBf16>), 1, 32, 0, nullptr, a_registers.data(), b_registers.data(),
               d.data());
  simt::options().round_toward_zero = false;

  bool is_right = simt::stats().mma == kTilesM * kTilesN;
  for_each_value([&](int tile, int at, int where) {
    const int row = at % 128 % 16;
    const int col = at % 128 / 16;
    double sum = c[at];
    double magnitude = std::fabs(sum);
    for (int k = 0; k < kShape.k; ++k) {
      const double product = static_cast<double>(a[(tile / kTilesN * kShape.k + k) * 16 + row]) *
                             b[(tile % kTilesN * kShape.k + k) * 8 + col];
      sum += product;
      magnitude += std::fabs(product);
    }
    // One rounding of at most the magnitude for each addition, of 2^-24; truncation is 2^-23.
    const double error = d[where] - sum;
    if (rounding == Rounding::kNearest) {
      is_right &= std::fabs(error) <= kShape.k * 0x1p-24 * magnitude;
    } else {
      is_right &= std::fabs(d[where]) <= std::fabs(sum);
      is_right &= std::fabs(error) <= 0x1p-23 * std::fabs(sum);
    }
  });
  check(name, is_right);
}

__global__ void ldmatrix_kernel(const uint16_t* rows, uint32_t* out, int row_stride) {
  DYKAF_SHARED(uint16_t, tile, [32 * 40]);
  for (int i = threadIdx.x; i < 32 * row_stride; i += 32) {
    tile[i] = rows[i];
  }
  __syncwarp();
  uint32_t fragment[4];
  ldmatrix_x4(fragment, &tile[threadIdx.x * row_stride]);
  for (int i = 0; i < 4; ++i) {
    out[threadIdx.x * 4 + i] = fragment[i];
  }
}

void test_ldmatrix() {
  std::vector<uint16_t> rows(32 * 40);
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = static_cast<uint16_t>(i * 40503u);
  }
  std::vector<uint32_t> out(128);
  // A stride of 5 x 16 bytes visits the eight 16-byte slots of the banks once; 4 x 16 only two.
  for (const int row_stride : {40, 32}) {
    simt::reset();
    DYKAF_LAUNCH(ldmatrix_kernel, 1, 32, 0, nullptr, rows.data(), out.data(), row_stride);
    bool is_right = true;
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const uint16_t* pair = &rows[(8 * matrix + lane / 4) * row_stride + lane % 4 * 2];
        is_right &= out[lane * 4 + matrix] == (pair[0] | uint32_t{pair[1]} << 16);
      }
    }
    check("ldmatrix layout", is_right);
    check("ldmatrix bank conflicts",
          simt::stats().ldmatrix_conflicts == (row_stride == 40 ? 0u : 4u * 6u));
  }
}

template <typename T>
__global__ void shuffle_kernel(int* num_wrong) {
  const int lane = threadIdx.x % 32;
  const T value = static_cast<T>(100 + lane);
  const auto expect = [&](T got, int source) {
    if (got != static_cast<T>(100 + source)) {
      atomicAdd(num_wrong, 1);
    }
  };
  expect(__shfl_sync(0xFFFFFFFFu, value, 5), 5);
  expect(__shfl_sync(0xFFFFFFFFu, value, lane + 1), (lane + 1) % 32);
  expect(__shfl_sync(0xFFFFFFFFu, value, 2, 8), lane / 8 * 8 + 2);
  expect(__shfl_xor_sync(0xFFFFFFFFu, value, 16), lane ^ 16);
  expect(__shfl_xor_sync(0xFFFFFFFFu, value, 3, 4), lane ^ 3);
  expect(__shfl_down_sync(0xFFFFFFFFu, value, 3), lane + 3 < 32 ? lane + 3 : lane);
  expect(__shfl_down_sync(0xFFFFFFFFu, value, 1, 2), lane % 2 == 0 ? lane + 1 : lane);
  expect(__shfl_up_sync(0xFFFFFFFFu, value, 4u), lane >= 4 ? lane - 4 : lane);
  if (lane < 8) {
    expect(__shfl_xor_sync(0x000000FFu, value, 7), lane ^ 7);
  } else {
    expect(__shfl_xor_sync(0xFFFFFF00u, value, 1), lane ^ 1);
  }
}

__global__ void vote_kernel(int* num_wrong) {
  const int lane = threadIdx.x % 32;
  const bool is_right = __ballot_sync(0xFFFFFFFFu, lane % 4 == 1) == 0x22222222u &&
                        __any_sync(0xFFFFFFFFu, lane == 9) &&
                        !__any_sync(0xFFFFFFFFu, lane == 32) &&
                        __all_sync(0xFFFFFFFFu, lane < 32) && !__all_sync(0xFFFFFFFFu, lane < 31);
  if (!is_right) {
    atomicAdd(num_wrong, 1);
  }
}

void test_shuffles_and_votes() {
  int num_wrong = 0;
  DYKAF_LAUNCH(shuffle_kernel<float>, 3, 96, 0, nullptr, &num_wrong);
  DYKAF_LAUNCH(shuffle_kernel<double>, 3, 96, 0, nullptr, &num_wrong);
  DYKAF_LAUNCH(shuffle_kernel<int>, 3, 96, 0, nullptr, &num_wrong);
  DYKAF_LAUNCH(shuffle_kernel<unsigned>, 3, 96, 0, nullptr, &num_wrong);
  check("shuffles", num_wrong == 0);
  DYKAF_LAUNCH(vote_kernel, 3, 96, 0, nullptr, &num_wrong);
  check("votes", num_wrong == 0);
}

__global__ void atomic_kernel(int* sum, unsigned* bits, int* largest) {
  atomicAdd(sum, 1);
  atomicOr(bits, 1u << threadIdx.x % 32);
  atomicMax(largest, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
}

void test_atomics() {
  int sum = 0;
  unsigned bits = 0;
  int largest = -1;
  DYKAF_LAUNCH(atomic_kernel, 200, 64, 0, nullptr, &sum, &bits, &largest);
  check("atomics", sum == 12800 && bits == 0xFFFFFFFFu && largest == 12799);
}

void test_conversions() {
  const float one_and_half_step = std::bit_cast<float>(0x3F801000u);
  bool is_right = (round_tf32(one_and_half_step) & 0xFFFFE000u) == 0x3F802000u;
  is_right &= std::isnan(std::bit_cast<float>(round_tf32(NAN) & 0xFFFFE000u));
  is_right &= round_tf32(INFINITY) == 0x7F800000u;
  const uint64_t seed = simt::options().seed;
  simt::options().seed = 0;
  is_right &= (round_tf32(0.1f) & 0x1FFF) == 0;
  simt::options().seed = 2;
  is_right &= (round_tf32(0.1f) & 0x1FFF) != 0;
  simt::options().seed = seed;
  check("round_tf32", is_right);

  const float tie_to_even = std::bit_cast<float>(0x3F808000u);
  const float tie_up = std::bit_cast<float>(0x3F818000u);
  check("pack_bf16",
        pack_bf16(tie_to_even, tie_up) == 0x3F823F80u && pack_bf16(-2.0f, NAN) == 0x7FFFC000u);
  check("min and max", min(NAN, 1.0f) == 1.0f && max(2.0f, NAN) == 2.0f && min(3, 2) == 2 &&
                           max(int64_t{1} << 40, 7) == int64_t{1} << 40);
}

}  // namespace
