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

// The moments follow a refresh of `side`. The second one's entries along the side are permuted
// (order[i]: the old place of the new i) and multiplied by growth[i]; exp_avg becomes `turned`
// [m, n], its rotation, without what is rounding there. A full second moment grows where it is too
// small for the momentum that has come (dykaf/bounds.h), so that updates stay bounded as they are
// in one basis. `scratch` is [m, n].
template <typename T>
void move_moments_(const Problem<T>& p, const Options& options, Side side, const int64_t* order,
                   const T* growth, const T* turned, T* scratch);

}  // namespace dykaf::cpu
