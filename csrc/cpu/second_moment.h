// The second moment of Adam in its three forms, of one matrix in the rotated basis.
#pragma once

#include <vector>

#include "dykaf/types.h"

namespace dykaf::cpu {

// sqrt of the compact second moment as an outer product: root_ij = row_i col_j.
template <typename T>
struct RootFactors {
  std::vector<T> row;  // [m]
  std::vector<T> col;  // [n]
};

// Advances the compact second moment (rank_one or factored) with the gradient tau H.
template <typename T>
RootFactors<T> compact_second_moment_(const Problem<T>& p, const Options& options, const T* H,
                                      T tau);

// The second moment follows a refresh of `side`: its entries along the side are permuted
// (order[i]: the old place of the new i) and multiplied by growth[i].
template <typename T>
void reorder_second_moment_(const Problem<T>& p, const Options& options, Side side,
                            const int64_t* order, const T* growth);

}  // namespace dykaf::cpu
