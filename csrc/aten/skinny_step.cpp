// The step of skinny matrices.
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/stack.h>

#include <cmath>

#include "aten/bounds.h"
#include "aten/products.h"
#include "aten/skinny.h"

namespace dykaf::aten {

at::Tensor mean_outside(const Options& options, const at::Tensor& total, const at::Tensor& inside,
                        int64_t num) {
  // Below the bound on the rounding of the difference it is not known.
  const at::Tensor least = total.mul(least_outside_of(total, options));
  return at::maximum(total.sub(inside), least).div_(num);
}

at::Tensor momentum_in(const at::Tensor& V, const at::Tensor& exp_avg) {
  const at::Tensor lengths = exp_avg.square().sum(-1, /*keepdim=*/true).sqrt_();
  return without_noise(full_product(exp_avg, V.mT()), lengths.mul_(rounding_share_of(exp_avg, 1)));
}

namespace {

// One step of a batch, whose matrices are seen with the short side first, [b, s, l].
class SkinnyStep {
 public:
  SkinnyStep(Batch& batch, const Inputs& inputs, const ScaledGradients& gradients)
      : batch_(batch),
        options_(inputs.options),
        gradients_(gradients),
        w_(batch.first()),
        s_(w_.short_side()),
        l_(w_.long_side()),
        inner_(w_.rows[0]),
        Q_(batch.get(w_.is_wide() ? &Matrix::Q_L : &Matrix::Q_R)),
        noise_(of_matrix(gradients.largest.mul(rounding_share_of(gradients.H, s_)))),
        X_(without_noise(full_product(Q_.mT(), oriented(gradients.H)), noise_)) {}

  // Returns the update in the basis of the short side, before lr.
  at::Tensor adam_update_() {
    const at::Tensor V =
        batch_.get_part([&](const Matrix& w) { return w.basis.narrow(0, 0, inner_); });
    const at::Tensor XV =
        without_noise(full_product(X_, V.mT()), noise_.mul(std::sqrt(static_cast<double>(l_))));
    const at::Tensor rest = mean_outside(options_, X_.square().sum(2, /*keepdim=*/true),
                                         XV.square().sum(2, true), l_ - inner_)
                                .sqrt_();

    const at::Tensor step = batch_.get(&Matrix::step).add(1);
    const at::Tensor t = step.to(batch_.wide_dtype());
    const at::Tensor tau = of_matrix(gradients_.tau.clamp_max(largest_adam_tau_of(X_, w_.m, w_.n)));
    const at::Tensor left = at::pow(options_.beta1, t).neg_().add_(1);
    const at::Tensor correction = of_matrix(left);
    const at::Tensor root = of_matrix(at::pow(options_.beta2, t).neg_().add_(1).sqrt_());
    const at::Tensor bound = of_matrix(update_bounds(options_, t));

    const at::Tensor moments = batch_.get(&Matrix::exp_avg_sq).clone();
    const auto inverse_root = [&](at::Tensor moment, const at::Tensor& x) {
      moment.mul_(options_.beta2).add_(x.mul(tau).square_(), 1 - options_.beta2);
      return moment.sqrt().div_(root).add_(options_.eps).reciprocal_();
    };
    const at::Tensor within = inverse_root(moments.narrow(2, 0, inner_), XV);
    const at::Tensor beyond = inverse_root(moments.narrow(2, w_.skinny_rank, 1), rest);

    const at::Tensor exp_avg = oriented(batch_.get(&Matrix::exp_avg))
                                   .mul(options_.beta1)
                                   .add_(X_.mul(tau), 1 - options_.beta1);
    at::Tensor M = exp_avg.div(correction);
    if (options_.nesterov) M.mul_(options_.beta1).add_(X_.mul(tau), 1 - options_.beta1);
    // (M V^T within) V + (M - M V^T V) beyond.
    const at::Tensor MV = momentum_in(V, M);
    const at::Tensor of_V = MV.mul(within).clamp(bound.neg(), bound).sub_(MV.mul(beyond));
    const at::Tensor update = M.mul(beyond).add_(full_product(of_V, V));
    batch_.set(&Matrix::step, step);
    batch_.set(&Matrix::exp_avg, oriented(exp_avg));
    batch_.set(&Matrix::exp_avg_sq, moments);
    batch_.set(&Matrix::update_rms, rms_of(batch_, update));
    return update;
  }

  // In the original coordinates.
  at::Tensor turned_back(const at::Tensor& update) const {
    return oriented(full_product(Q_, update));
  }

  // The averages of both sides, and the gradients' rows into the bases.
  void factor_update_() {
    const at::Tensor gram = full_product(X_, X_.mT());
    const at::Tensor rho = batch_.get(&Matrix::rho);
    const int64_t short_idx = w_.is_wide() ? 0 : 1;
    const auto kept = [&](int64_t side) {
      return rho.select(1, side).div(gradients_.tau).square_().mul_(options_.factor_beta);
    };
    const Array factor = w_.is_wide() ? &Matrix::L : &Matrix::R;
    const double gain = 1 - options_.factor_beta;
    const at::Tensor F = batch_.get(factor)
                             .mul(of_matrix(kept(short_idx)))
                             .add_(gram, gain / static_cast<double>(l_));
    const at::Tensor norm =
        at::linalg_vector_norm(F, 2, at::IntArrayRef({1, 2}), false, batch_.wide_dtype());
    batch_.set_where(factor, per_matrix(norm.gt(0)), F.div(of_matrix(norm)));
    const at::Tensor rho_short =
        at::where(norm.gt(0), gradients_.tau.mul(norm.sqrt()), rho.select(1, short_idx));

    const double row_gain = gain / static_cast<double>(s_);
    const at::Tensor kept_long = kept(1 - short_idx);
    const at::Tensor trace = gram.diagonal(0, 1, 2)
                                 .sum(at::IntArrayRef({1}), false, batch_.wide_dtype())
                                 .mul_(row_gain)
                                 .add_(kept_long);
    const at::Tensor is_known = trace.gt(0);
    const at::Tensor decay = kept_long.div(trace).to(batch_.dtype());
    batch_.set_where(&Matrix::flat, is_known, batch_.get(&Matrix::flat).mul(decay));
    const at::Tensor core = batch_.get(&Matrix::core).mul(per_matrix(decay));
    core.diagonal(0, 1, 2)
        .narrow(1, w_.rows[1], s_)
        .copy_(trace.reciprocal().mul_(row_gain).to(batch_.dtype()).unsqueeze(1));
    batch_.set_where(&Matrix::core, per_matrix(is_known), core);
    batch_.set_part([&](const Matrix& w) { return w.basis.narrow(0, w.rows[1], s_); }, X_);
    const at::Tensor rho_long =
        at::where(is_known, gradients_.tau.mul(trace.sqrt()), rho.select(1, 1 - short_idx));
    batch_.set(&Matrix::rho, w_.is_wide() ? at::stack({rho_short, rho_long}, 1)
                                          : at::stack({rho_long, rho_short}, 1));
  }

 private:
  at::Tensor oriented(const at::Tensor& x) const { return w_.is_wide() ? x : x.mT(); }
  at::Tensor of_matrix(const at::Tensor& x) const { return per_matrix(x.to(batch_.dtype())); }

  Batch& batch_;
  const Options& options_;
  const ScaledGradients& gradients_;
  const Matrix& w_;
  const int64_t s_;
  const int64_t l_;
  const int64_t inner_;
  const at::Tensor Q_;
  const at::Tensor noise_;  // entries of rotated gradients below it are rounding
  const at::Tensor X_;      // rotated gradients over tau
};

}  // namespace

at::Tensor skinny_step_(Batch& batch, const Inputs& inputs, const ScaledGradients& gradients) {
  SkinnyStep step(batch, inputs, gradients);
  const at::Tensor update = step.turned_back(step.adam_update_());
  step.factor_update_();
  return update;
}

void count_rows_(const Batch& batch) {
  for (const Matrix* w : batch.matrices()) w->rows[1] += w->short_side();
}

}  // namespace dykaf::aten
