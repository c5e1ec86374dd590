// dykaf/bounds.h for tensors.
#pragma once

#include "aten/torch.h"
#include "dykaf/bounds.h"

namespace dykaf::aten {

// rounding_share in the dtype of x.
inline double rounding_share_of(const at::Tensor& x, int64_t side) {
  return x.scalar_type() == at::kDouble ? rounding_share<double>(side)
                                        : rounding_share<float>(side);
}

inline double least_outside_of(const at::Tensor& x, const Options& options) {
  return x.scalar_type() == at::kDouble ? least_outside<double>(options)
                                        : least_outside<float>(options);
}

inline double largest_adam_tau_of(const at::Tensor& x, int64_t m, int64_t n) {
  return x.scalar_type() == at::kDouble ? largest_adam_tau<double>(m, n)
                                        : largest_adam_tau<float>(m, n);
}

// momentum_bound, momentum_floor and update_bound of counts of steps, in their dtype.
at::Tensor momentum_bounds(const Options& options, const at::Tensor& steps);
at::Tensor momentum_floors(const Options& options, const at::Tensor& steps);
at::Tensor update_bounds(const Options& options, const at::Tensor& steps);

// x without its entries of a magnitude below `noise`.
at::Tensor without_noise(const at::Tensor& x, const at::Tensor& noise);

}  // namespace dykaf::aten
