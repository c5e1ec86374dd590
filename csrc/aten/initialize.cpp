// The first gradient of matrices: factors, first bases, first refresh dates. It waits for the
// device, once per matrix in a training run.
#include <ATen/Context.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/stack.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "aten/batch_ops.h"
#include "aten/first_basis.h"
#include "aten/ops.h"
#include "aten/products.h"
#include "aten/skinny.h"
#include "dykaf/prior.h"
#include "dykaf/schedule.h"

namespace dykaf::aten {
namespace {

bool set_rank_one_prior_(const Matrix& w, const Options& options, const at::Tensor& H, double tau) {
  const auto top = top_singular_triple(H);
  if (!top) return false;
  w.L.copy_(at::outer(top->u, top->u));
  w.R.copy_(at::outer(top->v, top->v));
  const auto rho = rank_one_rho(options, w.m, w.n, tau * top->sigma);
  for (int64_t side = 0; side < 2; ++side) {
    w.rho.select(0, side).fill_(rho[static_cast<size_t>(side)]);
  }
  return true;
}

// The first basis of F, and F in it.
void set_first_basis_(const Matrix& w, const at::Tensor& F, const at::Tensor& Q,
                      const at::Tensor& gradient, bool is_rank_one) {
  const auto vectors = is_rank_one ? rank_one_vector(F) : leading_eigenvectors(F, gradient);
  const auto basis = vectors ? complete_basis(*vectors) : std::nullopt;
  if (!basis) {
    Q.copy_(at::eye(Q.size(0), Q.options()));
    w.refresh_fallbacks.add_(1);
    return;
  }
  Q.copy_(*basis);
  const at::Tensor lower = full_product(Q.t(), full_product(F, Q)).tril();
  F.copy_(lower.add(lower.tril(-1).t()));
}

void initialize_dense_(const Matrix& w, const Inputs& inputs, const ScaledGradients& gradients) {
  const Options& options = inputs.options;
  const at::Tensor H = gradients.H[0];
  const bool starts_rank_one = options.init == Init::kRankOne && w.L.defined() && w.R.defined() &&
                               set_rank_one_prior_(w, options, H, gradients.tau[0].item<double>());
  Batch batch({&w});
  if (!starts_rank_one) {
    set_identity_prior_(batch, options, gradients, at::ones_like(gradients.tau, at::kBool));
  }
  factor_update_(batch, inputs, gradients);
  batch.commit();
  // With init "rank_one" the splitting integrators keep the factors at rank one.
  const bool is_rank_one = options.init == Init::kRankOne && w.L.defined() && w.R.defined() &&
                           options.integrator != Integrator::kDiagonal;
  if (w.L.defined()) set_first_basis_(w, w.L, w.Q_L, H, is_rank_one);
  if (w.R.defined()) set_first_basis_(w, w.R, w.Q_R, H.t(), is_rank_one);
}

}  // namespace

void initialize_(const Matrix& w, const Inputs& inputs) {
  Options options = inputs.options;
  options.precision = MatmulPrecision::kHighest;
  options.roots = Roots::kExact;  // there is no basis yet
  const Inputs full{.options = options, .amp_scale = inputs.amp_scale};
  const ScaledGradients gradients = scaled_gradients(Batch({&w}), full);
  if (w.is_skinny()) {
    initialize_skinny_(w, options, gradients.H[0], gradients.tau[0].item<double>());
  } else {
    initialize_dense_(w, full, gradients);
  }
  // Last, for a matrix with dates counts as started.
  for (size_t side = 0; side < 2; ++side) {
    w.next_refresh[side] = next_refresh(0, options, w.refresh_offset[side]);
  }
}

void initialize_(const Matrices& matrices, const Inputs& inputs) {
  if (matrices.empty() || (inputs.skip && inputs.skip->item<int32_t>() != 0)) return;
  const c10::DeviceGuard guard(matrices[0].step.device());
  const at::NoTF32Guard full_precision;
  std::vector<at::Tensor> scalars;
  for (const Matrix& w : matrices) scalars.push_back(w.grad_max);
  const at::Tensor maxima = at::stack(scalars).to(at::kCPU, at::kDouble);
  try {
    for (size_t i = 0; i < matrices.size(); ++i) {
      if (maxima.const_data_ptr<double>()[i] == 0) {
        std::fill_n(matrices[i].next_refresh, 2, kSawZero);
      } else {
        initialize_(matrices[i], inputs);
      }
    }
  } catch (...) {
    for (const Matrix& w : matrices) reset_(w);
    throw;
  }
}

void reset_(const Matrix& w) {
  for (const Array array :
       {&Matrix::L, &Matrix::R, &Matrix::Q_L, &Matrix::Q_R, &Matrix::basis, &Matrix::core,
        &Matrix::flat, &Matrix::rho, &Matrix::refresh_fallbacks}) {
    if ((w.*array).defined()) (w.*array).zero_();
  }
  std::fill_n(w.next_refresh, 2, 0);
  if (w.rows != nullptr) std::fill_n(w.rows, 2, 0);
}

}  // namespace dykaf::aten
