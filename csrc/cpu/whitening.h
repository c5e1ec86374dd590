// Tracked powers of the factors, for the coupled averages and for whitened updates.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/matrix.h"
#include "dykaf/whitening.h"

namespace dykaf::cpu {

// Of a factor F [n, n]: tr(F) / n.
template <typename T>
double mean_eigenvalue(const T* factor, int64_t n);

// The diagonal of F^-exponent in trace normalisation, of a rotated factor F [n, n]; ones for null.
template <typename T>
std::vector<T> inverse_powers(const T* factor, int64_t n, double exponent);

// out_ij = rows_i X_ij cols_j of [m, n]; null rows or columns count as ones. out may alias X.
template <typename T>
void multiply_sides(const T* X, const T* rows, const T* cols, int64_t m, int64_t n, T* out);

// dykaf/whitening.h's step of the factors and the momentum; `update` takes U in the basis. Uses all
// else of the workspace but `gradient`, where H may be.
template <typename T>
void whitened_update_(const Problem<T>& p, const Options& options, const T* H, T tau, T* update,
                      const Workspace<T>& workspace);

}  // namespace dykaf::cpu
