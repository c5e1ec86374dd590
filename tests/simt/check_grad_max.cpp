// max|G|: every dtype, tails, and NaN and infinity wherever they may be.
#include "matrix_case.h"

namespace kernel_check {
namespace {

using dykaf::cuda::plan_grad_max;

// A gradient and what its maximum must be.
struct Sample {
  TypedArray values;
  int64_t size;
  double expected;
};

Sample random_sample(int64_t size, DType dtype, int64_t offset, Rng& rng) {
  std::normal_distribution<float> normal;
  Sample s{TypedArray(size, dtype, offset), size, 0};
  for (int64_t i = 0; i < size; ++i) {
    s.values.set(i, normal(rng));
    s.expected = std::max(s.expected, double{std::fabs(s.values[i])});
  }
  return s;
}

// All in one plan.
std::vector<std::byte> require_maxima(const std::vector<Sample>& samples) {
  std::vector<Gradient> gradients;
  for (const Sample& s : samples) gradients.push_back({s.values.get(), s.size, s.values.dtype});
  const Array<double> maxima(static_cast<int64_t>(samples.size()));
  run([&](void* workspace) { return plan_grad_max(gradients, maxima.get(), workspace); });
  for (size_t i = 0; i < samples.size(); ++i) {
    const double actual = maxima[static_cast<int64_t>(i)];
    const double expected = samples[i].expected;
    require("maximum of gradient " + std::to_string(i),
            std::isnan(expected) ? std::isnan(actual) : actual == expected);
  }
  std::vector<std::byte> bytes;
  append_bytes(bytes, maxima);
  return bytes;
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

std::vector<std::byte> sizes_and_offsets() {
  Rng rng(3);
  std::vector<Sample> samples;
  for (const DType dtype : kDTypes) {
    // A block reads 8192 elements.
    for (const int64_t size : {1, 7, 8, 255, 2049, 8192, 8193, 20000}) {
      for (const int64_t offset : {0, 1, 4}) {
        samples.push_back(random_sample(size, dtype, offset, rng));
      }
      // The largest entry is negative and the last one; all entries are zero.
      samples.push_back(random_sample(size, dtype, 0, rng));
      samples.back().values.set(size - 1, -64);
      samples.back().expected = 64;
      samples.push_back(random_sample(size, dtype, 0, rng));
      for (int64_t i = 0; i < size; ++i) samples.back().values.set(i, 0);
      samples.back().expected = 0;
    }
  }
  return require_maxima(samples);
}

// NaN at one place, and larger numbers around it: in the same unit, in the thread's next unit, in
// other lanes, warps and blocks.
std::vector<std::byte> not_finite() {
  Rng rng(4);
  std::vector<Sample> samples;
  for (const DType dtype : kDTypes) {
    for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
      for (const int64_t place : {0, 1, 7, 8, 250, 255, 2047, 2048, 4100, 8191, 8192, 16999}) {
        samples.push_back(random_sample(17000, dtype, 0, rng));
        for (const int64_t far : {1, 7, 40, 300, 2048, 8192}) {
          if (place >= far) samples.back().values.set(place - far, 100);
          if (place + far < 17000) samples.back().values.set(place + far, 200);
        }
        samples.back().values.set(place, bad);
        samples.back().expected = std::numeric_limits<double>::quiet_NaN();
      }
    }
  }
  return require_maxima(samples);
}

// The second stage has more than one partial maximum for a thread.
std::vector<std::byte> many_blocks() {
  constexpr int64_t kSize = 8192 * 258 - 5;
  std::vector<Sample> samples;
  for (const float last : {-3.0f, std::nanf("")}) {
    samples.push_back({TypedArray(kSize, DType::kBFloat16, 0), kSize, std::fabs(last)});
    for (int64_t i = 0; i < kSize; ++i) samples.back().values.bits[i] = 0x3f80;  // 1
    samples.back().values.set(kSize - 1, last);
  }
  return require_maxima(samples);
}

}  // namespace

void check_grad_max() {
  check_schedules("grad_max sizes and offsets", sizes_and_offsets);
  check_schedules("grad_max not finite", not_finite);
  check_schedules("grad_max many blocks", many_blocks);
  check_schedules("grad_max of nothing", [] { return require_maxima({}); });
}

}  // namespace kernel_check
