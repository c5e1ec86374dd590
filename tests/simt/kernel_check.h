// What the kernel checks share: exact-size arrays, plans run as on a device, sweeps over schedules.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "dykaf/cuda_ops.h"
#include "state.h"
#include "test_check.h"

namespace kernel_check {

using Rng = std::mt19937;

// A device array: it ends where its allocation ends, so that a sanitizer sees any access beyond,
// and starts at a 256-byte boundary, as torch's do, or `offset` elements after one, as parts of a
// stack may. Filled with NaN.
template <typename T>
class Array {
 public:
  explicit Array(int64_t size = 0, int64_t offset = 0)
      : memory_(allocate(sizeof(T) * static_cast<size_t>(size + offset)), &std::free),
        data_(static_cast<T*>(memory_.get()) + offset),
        size_(size) {
    std::memset(static_cast<void*>(data_), 0xff, sizeof(T) * static_cast<size_t>(size));
  }
  Array(const std::vector<T>& values, int64_t offset = 0)
      : Array(static_cast<int64_t>(values.size()), offset) {
    std::copy(values.begin(), values.end(), data_);
  }
  T* get() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }
  std::vector<T> values() const { return {data_, data_ + size_}; }

 private:
  // Not aligned_alloc, which wants a multiple of the alignment.
  static void* allocate(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, bytes) != 0) throw std::bad_alloc();
    return memory;
  }

  std::shared_ptr<void> memory_;
  T* data_;
  int64_t size_;
};

inline Array<float> randn(int64_t size, Rng& rng, int64_t offset = 0) {
  std::normal_distribution<float> normal;
  Array<float> array(size, offset);
  for (int64_t i = 0; i < size; ++i) array[i] = normal(rng);
  return array;
}

inline std::vector<double> doubles(const Array<float>& array) {
  return {array.get(), array.get() + array.size()};
}

// Runs what make_plan(workspace) gives, with workspace full of NaN; returns the workspace. Throws
// on a launch error.
inline Array<std::byte> run(const std::function<dykaf::cuda::Plan(void*)>& make_plan) {
  const Array<std::byte> workspace(make_plan(nullptr).workspace_bytes);
  const dykaf::cuda::Plan plan = make_plan(workspace.get());
  const Array<std::byte> image(plan.image);
  const int error = plan.run(image.get(), nullptr);
  if (error != 0) throw std::runtime_error("launch error " + std::to_string(error));
  return workspace;
}

// The schedules that every check runs under: in order, in reverse, and `num_seeds` shuffled ones.
inline int g_num_seeds = 2;
// Only checks whose names start with one of these; none: all.
inline std::vector<std::string> g_only;
inline int g_num_checks = 0;

inline bool is_wanted(const std::string& name) {
  const bool wanted =
      g_only.empty() || std::any_of(g_only.begin(), g_only.end(), [&](const std::string& prefix) {
        return name.starts_with(prefix);
      });
  g_num_checks += wanted;
  return wanted;
}

// The first failure ends the program.
inline bool g_stops = false;

inline void report(const std::string& name, bool is_right, const std::string& found = "") {
  check(name, is_right, found);
  std::fflush(stdout);  // a sanitizer ends the program without it
  if (!is_right && g_stops) std::exit(1);
}

// body() under each schedule gives the bytes of its outputs: they must be the same. A fault that
// the executor finds fails the check.
inline void check_schedules(const std::string& name,
                            const std::function<std::vector<std::byte>()>& body) {
  if (!is_wanted(name)) return;
  std::vector<std::byte> first;
  for (int seed = 0; seed < 2 + g_num_seeds; ++seed) {
    simt::options().seed = static_cast<uint64_t>(seed);
    try {
      const std::vector<std::byte> outputs = body();
      if (seed == 0) first = outputs;
      if (outputs != first) return report(name, false, "seed " + std::to_string(seed) + " differs");
    } catch (const std::exception& fault) {
      return report(name, false, fault.what());
    }
  }
  report(name, true);
}

// For what does not hang on the schedule.
inline void check_once(const std::string& name, const std::function<void()>& body) {
  if (!is_wanted(name)) return;
  simt::options().seed = 0;
  try {
    body();
    report(name, true);
  } catch (const std::exception& fault) {
    report(name, false, fault.what());
  }
}

template <typename T>
void append_bytes(std::vector<std::byte>& bytes, const Array<T>& array) {
  const size_t end = bytes.size();
  const size_t size = sizeof(T) * static_cast<size_t>(array.size());
  bytes.resize(end + size);
  if (size > 0) std::memcpy(bytes.data() + end, array.get(), size);
}

// Fails unless |actual - expected| <= bound, entry by entry.
inline void require_close(const std::string& what, const Array<float>& actual,
                          const std::vector<double>& expected, const std::vector<double>& bound) {
  for (int64_t i = 0; i < actual.size(); ++i) {
    const double error = std::fabs(static_cast<double>(actual[i]) - expected[i]);
    if (!(error <= bound[i])) {
      throw std::runtime_error(what + "[" + std::to_string(i) + "]: expected " +
                               std::to_string(expected[i]) + " to " + std::to_string(bound[i]) +
                               ", got " + std::to_string(actual[i]));
    }
  }
}

inline void require_close(const std::string& what, double actual, double expected, double bound) {
  if (std::fabs(actual - expected) <= bound) return;
  char text[120];
  snprintf(text, sizeof text, ": expected %.9g to %.2g, got %.9g", expected, bound, actual);
  throw std::runtime_error(what + text);
}

inline void require(const std::string& what, bool holds) {
  if (!holds) throw std::runtime_error(what);
}

inline void require(const char* what, bool holds) {  // for inner loops: makes no string
  if (!holds) throw std::runtime_error(what);
}

}  // namespace kernel_check
