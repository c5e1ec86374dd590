// What kernels get to see of matrices and options.
#pragma once

#include "cuda/kernels/matrices.h"
#include "dykaf/bounds.h"
#include "dykaf/newton_schulz.h"

namespace dykaf::cuda {

inline MatrixOnDevice matrix_on_device(const Problem<float>& p) {
  return {
      .m = p.m,
      .n = p.n,
      .rotated_side = p.rotated_side(),
      .skinny_rank = p.skinny_rank,
      .rate = p.rate,
      .stream = p.stream,
      .place = p.place,
      .dtype = p.dtype,
      .has_two_averages = (p.L != nullptr && p.R != nullptr) || p.is_skinny(),
      .grad = p.grad,
      .param = p.param,
      .master = p.master,
      .exp_avg = p.exp_avg,
      .exp_avg_sq = p.exp_avg_sq,
      .exp_avg_sq_row = p.exp_avg_sq_row,
      .exp_avg_sq_col = p.exp_avg_sq_col,
      .exp_avg_sq_scale = p.exp_avg_sq_scale,
      .rho = p.rho,
      .basis = p.basis,
      .core = p.core,
      .flat = p.flat,
      .step = p.step,
      .update_rms = p.update_rms,
  };
}

inline std::vector<MatrixOnDevice> matrices_on_device(std::span<const Problem<float>> problems) {
  std::vector<MatrixOnDevice> matrices;
  for (const Problem<float>& p : problems) matrices.push_back(matrix_on_device(p));
  return matrices;
}

inline AdamOptions adam_options(const Options& options) {
  return {
      .beta1 = static_cast<float>(options.beta1),
      .one_minus_beta1 = static_cast<float>(1 - options.beta1),
      .beta2 = static_cast<float>(options.beta2),
      .one_minus_beta2 = static_cast<float>(1 - options.beta2),
      .eps = static_cast<float>(options.eps),
      .least_outside = static_cast<float>(least_outside<float>(options)),
      .full_rms = static_cast<float>(full_rms(options)),
  };
}

}  // namespace dykaf::cuda
