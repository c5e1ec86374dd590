// The first gradient of matrices: factors, first bases, first refresh dates. It waits for the
// device, for each batch in a training run.
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

// The first bases of the factors of a side, and the factors in them.
void set_first_bases_(Batch& batch, Side side, const at::Tensor& gradients, bool is_rank_one) {
  const Array factor = side == Side::kLeft ? &Matrix::L : &Matrix::R;
  const at::Tensor F = batch.get(factor);
  const auto [Q, sound] = is_rank_one ? rank_one_basis(F) : first_basis(F, gradients);
  const at::Tensor is_sound = per_matrix(sound);
  const at::Tensor lower = full_product(Q.mT(), full_product(F, Q)).tril();
  batch.set(side == Side::kLeft ? &Matrix::Q_L : &Matrix::Q_R,
            at::where(is_sound, Q, at::eye(Q.size(1), Q.options())));
  batch.set(factor, at::where(is_sound, lower.add(lower.tril(-1).mT()), F));
  batch.set(&Matrix::refresh_fallbacks,
            batch.get(&Matrix::refresh_fallbacks).add(sound.logical_not()));
}

void initialize_dense_(Batch& batch, const Inputs& inputs, const ScaledGradients& gradients) {
  const Options& options = inputs.options;
  const bool is_two_sided = batch.first().L.defined() && batch.first().R.defined();
  const bool asks_rank_one = options.init == Init::kRankOne && is_two_sided;
  at::Tensor starts_flat = at::ones_like(gradients.tau, at::kBool);
  for (int64_t i = 0; asks_rank_one && i < batch.size(); ++i) {
    const double tau = gradients.tau[i].item<double>();
    const Matrix& w = *batch.matrices()[static_cast<size_t>(i)];
    starts_flat[i].fill_(!set_rank_one_prior_(w, options, gradients.H[i], tau));
  }
  set_identity_prior_(batch, options, gradients, starts_flat);
  factor_update_(batch, inputs, gradients);
  // With init "rank_one" the splitting integrators keep the factors at rank one.
  const bool is_rank_one = asks_rank_one && options.integrator != Integrator::kDiagonal;
  if (batch.first().L.defined()) set_first_bases_(batch, Side::kLeft, gradients.H, is_rank_one);
  if (batch.first().R.defined()) {
    set_first_bases_(batch, Side::kRight, gradients.H.mT(), is_rank_one);
  }
  batch.commit();
}

void initialize_(Batch batch, const Inputs& inputs) {
  Options options = inputs.options;
  options.precision = MatmulPrecision::kHighest;
  options.roots = Roots::kExact;  // there is no basis yet
  const Inputs full{.options = options, .amp_scale = inputs.amp_scale};
  const ScaledGradients gradients = scaled_gradients(batch, full);
  if (batch.first().is_skinny()) {
    initialize_skinny_(batch, options, gradients);
  } else {
    initialize_dense_(batch, full, gradients);
  }
  // Last, for a matrix with dates counts as started.
  for (const Matrix* w : batch.matrices()) {
    for (size_t side = 0; side < 2; ++side) {
      w->next_refresh[side] = next_refresh(0, options, w->refresh_offset[side]);
    }
  }
}

}  // namespace

void initialize_(const Matrix& w, const Inputs& inputs) { initialize_(Batch({&w}), inputs); }

void initialize_(const Matrices& matrices, const Inputs& inputs) {
  if (matrices.empty() || (inputs.skip && inputs.skip->item<int32_t>() != 0)) return;
  const c10::DeviceGuard guard(matrices[0].step.device());
  const at::NoTF32Guard full_precision;
  std::vector<at::Tensor> scalars;
  for (const Matrix& w : matrices) scalars.push_back(w.grad_max);
  const at::Tensor maxima = at::stack(scalars).to(at::kCPU, at::kDouble);
  try {
    std::vector<const Matrix*> seen;
    for (size_t i = 0; i < matrices.size(); ++i) {
      if (maxima.const_data_ptr<double>()[i] == 0) {
        std::fill_n(matrices[i].next_refresh, 2, kSawZero);
      } else {
        seen.push_back(&matrices[i]);
      }
    }
    for_each_batch(
        seen, [](const Matrix&) { return 0; },
        [&](Batch batch) { initialize_(std::move(batch), inputs); });
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
