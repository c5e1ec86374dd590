// Grouped launches: one grid serves many problems. Each problem owns a range of tiles (blocks) that
// starts at its `tile_begin`, a prefix sum that the host fills in.
#pragma once

#include <cstdint>

namespace dykaf::cuda {

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

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dykaf::cuda
