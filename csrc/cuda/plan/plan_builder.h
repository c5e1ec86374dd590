// Builds a Plan: hands out workspace, collects problem descriptions in the image.
#pragma once

#include <cstring>
#include <memory>
#include <utility>

#include "dykaf/cuda_ops.h"

namespace dykaf::cuda {

class PlanBuilder {
 public:
  explicit PlanBuilder(void* workspace) : workspace_(reinterpret_cast<uintptr_t>(workspace)) {}

  // `count` elements of scratch memory on the device, not initialised.
  template <typename T>
  T* take(int64_t count) {
    const uintptr_t start = workspace_ + static_cast<uintptr_t>(plan_.workspace_bytes);
    plan_.workspace_bytes += round_up(count * static_cast<int64_t>(sizeof(T)));
    return reinterpret_cast<T*>(start);
  }

  // Puts `values` into the image; returns where.
  template <typename T>
  size_t add(const std::vector<T>& values) {
    const size_t offset = plan_.image.size();
    plan_.image.resize(offset + round_up(static_cast<int64_t>(values.size() * sizeof(T))));
    if (!values.empty()) {
      std::memcpy(plan_.image.data() + offset, values.data(), values.size() * sizeof(T));
    }
    return offset;
  }

  void set_inputs(std::shared_ptr<PlanInputs> inputs) { plan_.inputs = std::move(inputs); }
  void launch(Plan::Launch launch) { plan_.launches.push_back(std::move(launch)); }

  Plan finish() { return std::move(plan_); }

 private:
  static int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

  uintptr_t workspace_;  // a number, since it may be null
  Plan plan_;
};

// Fills in tile_begin of each problem; num_tiles(problem) gives its tiles. Returns the grid's size.
template <typename ProblemArray, typename NumTiles>
int64_t assign_tiles(ProblemArray& problems, const NumTiles& num_tiles) {
  int64_t total = 0;
  for (auto& problem : problems) {
    problem.tile_begin = static_cast<int32_t>(total);
    total += num_tiles(problem);
  }
  return total;
}

// A place in the image, as T.
template <typename T>
const T* as(const std::byte* place) {
  return reinterpret_cast<const T*>(place);
}

}  // namespace dykaf::cuda
