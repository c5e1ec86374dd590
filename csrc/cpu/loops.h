// Parallel loops and reductions over contiguous arrays. Work is cut into chunks of a fixed size and
// partial sums are added in a fixed order, so results are the same bits for any number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "dykaf/types.h"

// On a function with a hot loop: compiled for AVX2 as well as for the baseline, chosen when the
// module is loaded. The bits are the same, for nothing is reordered or contracted. (Sanitizers
// start too late for that choice.)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__AVX2__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define DYKAF_WIDE __attribute__((target_clones("avx2", "default")))
#else
#define DYKAF_WIDE
#endif

namespace dykaf::cpu {

// Three float arrays of a chunk fit in a first-level cache.
inline constexpr int64_t kChunk = 2048;
// Threads are woken for at least this many elements.
inline constexpr int64_t kGrain = 16 * kChunk;

// body(chunk_idx, begin, end) for each chunk of [0, size).
template <typename Body>
void for_chunks(int64_t size, const Body& body) {
  const int64_t num_chunks = (size + kChunk - 1) / kChunk;
  at::parallel_for(0, num_chunks, kGrain / kChunk, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      body(chunk, chunk * kChunk, std::min(size, (chunk + 1) * kChunk));
    }
  });
}

// The sums over all chunks of the kNum numbers that body(begin, end) returns.
template <size_t kNum, typename Body>
std::array<double, kNum> sum_chunks(int64_t size, const Body& body) {
  std::vector<std::array<double, kNum>> partials((size + kChunk - 1) / kChunk);
  for_chunks(
      size, [&](int64_t chunk, int64_t begin, int64_t end) { partials[chunk] = body(begin, end); });
  std::array<double, kNum> total{};
  for (const auto& partial : partials) {
    for (size_t i = 0; i < kNum; ++i) total[i] += partial[i];
  }
  return total;
}

// sum_i x_i y_i in double. The independent lanes let the compiler use vectors without reordering.
template <typename T>
DYKAF_WIDE double dot(const T* x, const T* y, int64_t size) {
  constexpr int64_t kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      lanes[j] += static_cast<double>(x[i + j]) * static_cast<double>(y[i + j]);
    }
  }
  double total = 0;
  for (; i < size; ++i) total += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  for (double lane : lanes) total += lane;
  return total;
}

template <typename T>
double frobenius_norm(const T* x, int64_t size) {
  return std::sqrt(sum_chunks<1>(size, [&](int64_t begin, int64_t end) {
    return std::array{dot(x + begin, x + begin, end - begin)};
  })[0]);
}

template <typename T>
DYKAF_WIDE void combine_range_(T* out, const T* x, T of_out, T of_x, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = of_out * out[i] + of_x * x[i];
}

// out = of_out out + of_x x.
template <typename T>
void combine_(T* out, const T* x, double of_out, double of_x, int64_t size) {
  for_chunks(size, [&](int64_t, int64_t begin, int64_t end) {
    combine_range_(out + begin, x + begin, static_cast<T>(of_out), static_cast<T>(of_x),
                   end - begin);
  });
}

// Calls body with a null pointer of the element type that dtype names.
template <typename Body>
void visit_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat64:
      return body(static_cast<double*>(nullptr));
    case DType::kFloat32:
      return body(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return body(static_cast<c10::BFloat16*>(nullptr));
    case DType::kFloat16:
      return body(static_cast<c10::Half*>(nullptr));
  }
}

// out = scale * in, converted to T.
template <typename T, typename In>
DYKAF_WIDE void load_scaled(const In* in, T scale, T* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(in[i]) * scale;
}

}  // namespace dykaf::cpu
