// Which problem of a grouped launch a block works on.
#pragma once

#include "cuda/kernels/device/platform.cuh"

namespace dykaf::cuda {

// The last problem whose first tile is not after `tile`.
template <typename GroupedProblem>
DYKAF_DEVICE int find_problem(const GroupedProblem* problems, int num_problems, int tile) {
  int lo = 0;
  int hi = num_problems - 1;
  while (lo < hi) {
    const int mid = (lo + hi + 1) / 2;
    if (problems[mid].tile_begin <= tile) {
      lo = mid;
    } else {
      hi = mid - 1;
    }
  }
  return lo;
}

}  // namespace dykaf::cuda
