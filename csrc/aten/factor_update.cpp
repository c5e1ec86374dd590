// The integrator step of L, R and rho; csrc/cpu/factor_update.cpp names the sources. In units of
// tau, a = beta (rho / tau)^2 and b = 1 - beta.
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>

#include <cmath>

#include "aten/batch_ops.h"
#include "aten/products.h"
#include "aten/whitening.h"
#include "dykaf/prior.h"
#include "dykaf/whitening.h"

namespace dykaf::aten {
namespace {

// The gradients of a batch, and what each integrator does with them.
class FactorUpdate {
 public:
  FactorUpdate(Batch& batch, const Options& options, const ScaledGradients& gradients)
      : batch_(batch),
        options_(options),
        H_(gradients.H),
        tau_(gradients.tau),
        rho_(batch.get(&Matrix::rho)),
        moves_(gradients.largest.ne(0)) {}

  void ksl_() {
    const at::Tensor L = batch_.get(&Matrix::L);
    const at::Tensor R = batch_.get(&Matrix::R);
    const at::Tensor a = decay(0);
    const at::Tensor K = blend(L, a, left(R), gain());
    const at::Tensor norm_K = norms(K);
    const at::Tensor U = over(K, norm_K);
    const at::Tensor c = a.mul(inner(U, L));
    const at::Tensor B = blend(R, c, right(U), gain());
    const at::Tensor s = norms(B);
    const at::Tensor has_K = norm_K.gt(0);
    const at::Tensor has_B = has_K.logical_and(s.gt(0));
    set_factor_(&Matrix::L, has_K, U);
    set_factor_(&Matrix::R, has_B, over(B, s));
    set_rho_(has_B, s);
  }

  void bug_() {
    const at::Tensor L = batch_.get(&Matrix::L);
    const at::Tensor R = batch_.get(&Matrix::R);
    const at::Tensor a = decay(0);
    const double b = gain();
    const at::Tensor A = left(R);
    const at::Tensor B = right(L);
    const at::Tensor K = blend(L, a, A, b);
    const at::Tensor J = blend(R, a, B, b);
    const at::Tensor norm_K = norms(K);
    const at::Tensor norm_J = norms(J);
    const at::Tensor coupling = inner(multiplied(A, H_), multiplied(H_, B));
    const at::Tensor squares = inner(A, A).add_(inner(B, B));
    const at::Tensor with_gradient =
        a.square().mul_(inner(L, A)).add_(a.mul(squares), b).add_(coupling, b * b);
    const at::Tensor s =
        a.mul(inner(L, K)).mul_(inner(R, J)).add_(with_gradient, b).div_(norm_K.mul(norm_J));
    // Where K or J vanishes so does the numerator: s is NaN and the factors stay.
    const at::Tensor has_s = s.gt(0);
    set_factor_(&Matrix::L, has_s, over(K, norm_K));
    set_factor_(&Matrix::R, has_s, over(J, norm_J));
    set_rho_(has_s, s);
  }

  // F <- beta rho^2 F + (1 - beta) tau^2 increment / size, in unit norm with rho to match.
  void diagonal_() {
    const Matrix& first = batch_.first();
    const at::Tensor left_sum = symmetric(multiplied(H_, H_.mT()));
    const at::Tensor right_sum = symmetric(multiplied(H_.mT(), H_));
    const at::Tensor rho_L = averaged_(&Matrix::L, left_sum, 0, static_cast<double>(first.n));
    const at::Tensor rho_R = averaged_(&Matrix::R, right_sum, 1, static_cast<double>(first.m));
    set_rhos_(at::stack({rho_L, rho_R}, 1));
  }

  // The same, each with the inverse of the other factor as its metric: the right one's is the new
  // L.
  void coupled_() {
    const Matrix& first = batch_.first();
    const MatmulPrecision precision = options_.precision;
    const at::Tensor A = times_right(H_, metric(Side::kRight), precision);
    const at::Tensor rho_L =
        averaged_(&Matrix::L, symmetric(multiplied(A, A.mT())), 0, static_cast<double>(first.n));
    const at::Tensor B = times_left(metric(Side::kLeft), H_, precision);
    const at::Tensor rho_R =
        averaged_(&Matrix::R, symmetric(multiplied(B.mT(), B)), 1, static_cast<double>(first.m));
    set_rhos_(at::stack({rho_L, rho_R}, 1));
  }

  // The other side is the scaled identity of unit norm, which is not stored.
  void one_sided_() {
    const Matrix& first = batch_.first();
    const bool left = first.L.defined();
    const at::Tensor& H = H_;
    const at::Tensor sum = symmetric(left ? multiplied(H, H.mT()) : multiplied(H.mT(), H));
    const double other = std::sqrt(static_cast<double>(left ? first.n : first.m));
    const at::Tensor rho = averaged_(left ? &Matrix::L : &Matrix::R, sum, 0, other);
    set_rhos_(rho.unsqueeze(1).expand({-1, 2}));
  }

 private:
  double gain() const { return 1 - options_.factor_beta; }
  at::Tensor decay(int64_t side) const {
    return rho_.select(1, side).div(tau_).square_().mul_(options_.factor_beta);
  }

  at::Tensor multiplied(const at::Tensor& a, const at::Tensor& b) const {
    return product(a, b, options_.precision);
  }
  // The upper triangle mirrors the lower.
  static at::Tensor symmetric(const at::Tensor& x) { return x.tril().add_(x.tril(-1).mT()); }
  // H M H^T and H^T M H.
  at::Tensor left(const at::Tensor& M) const {
    return symmetric(multiplied(multiplied(H_, M), H_.mT()));
  }
  at::Tensor right(const at::Tensor& M) const {
    return symmetric(multiplied(H_.mT(), multiplied(M, H_)));
  }

  // a F + b increment.
  at::Tensor blend(const at::Tensor& F, const at::Tensor& a, const at::Tensor& increment,
                   double b) const {
    return F.mul(per_matrix(a.to(batch_.dtype()))).add_(increment, b);
  }
  at::Tensor norms(const at::Tensor& x) const {
    return at::linalg_vector_norm(x, 2, at::IntArrayRef({1, 2}), false, batch_.wide_dtype());
  }
  at::Tensor inner(const at::Tensor& x, const at::Tensor& y) const {
    return x.mul(y).sum(at::IntArrayRef({1, 2}), false, batch_.wide_dtype());
  }
  at::Tensor over(const at::Tensor& x, const at::Tensor& norm) const {
    return x.div(per_matrix(norm.to(batch_.dtype())));
  }

  InversePower metric(Side side) { return inverse_power(batch_, options_, side, kMetricExponent); }

  // Returns rho of the average. Damping adds that multiple of the average's mean eigenvalue.
  at::Tensor averaged_(Array factor, const at::Tensor& increment, int64_t side, double size) {
    const at::Tensor old = batch_.get(factor);
    at::Tensor F = blend(old, decay(side), increment, gain() / size);
    if (options_.damping > 0) {
      const at::Tensor mean =
          old.diagonal(0, 1, 2).mean(at::IntArrayRef({1}), true, rho_.scalar_type());
      const at::Tensor ridge = mean.mul(rho_.select(1, side).div(tau_).square_().unsqueeze(1));
      F.diagonal(0, 1, 2).add_(ridge.to(batch_.dtype()), gain() * options_.damping);
    }
    const at::Tensor norm = norms(F);
    const at::Tensor is_known = norm.gt(0);
    set_factor_(factor, is_known, over(F, norm));
    return at::where(is_known, tau_.mul(norm.sqrt()), rho_.select(1, side));
  }

  void set_factor_(Array factor, const at::Tensor& where, const at::Tensor& values) {
    batch_.set_where(factor, per_matrix(where.logical_and(moves_)), values);
  }
  void set_rho_(const at::Tensor& where, const at::Tensor& norm) {
    const at::Tensor rho = tau_.mul(norm.sqrt()).unsqueeze(1);
    set_rhos_(at::where(where.unsqueeze(1), rho, rho_));
  }
  // A zero gradient lets rho alone decay.
  void set_rhos_(const at::Tensor& rho) {
    batch_.set(&Matrix::rho,
               at::where(moves_.unsqueeze(1), rho, rho_.mul(std::sqrt(options_.factor_beta))));
  }

  Batch& batch_;
  const Options& options_;
  const at::Tensor H_;
  const at::Tensor tau_;
  const at::Tensor rho_;    // [b, 2]
  const at::Tensor moves_;  // bool [b]
};

}  // namespace

void set_identity_prior_(Batch& batch, const Options& options, const ScaledGradients& gradients,
                         const at::Tensor& where) {
  const Matrix& first = batch.first();
  const bool two_sided = first.L.defined() && first.R.defined();
  for (const auto& [factor, size] :
       {std::pair{&Matrix::L, first.m}, std::pair{&Matrix::R, first.n}}) {
    if (!(first.*factor).defined()) continue;
    const at::Tensor identity = at::eye(size, gradients.H.options());
    batch.set_where(factor, per_matrix(where),
                    identity.div(std::sqrt(static_cast<double>(size))).unsqueeze(0));
  }
  const auto wide = batch.wide_dtype();
  const at::Tensor norm =
      at::linalg_vector_norm(gradients.H, 2, at::IntArrayRef({1, 2}), false, wide)
          .mul_(gradients.tau);
  const auto unit = prior_rho(options, first.m, first.n, two_sided, 1.0);
  const at::Tensor rho = at::stack({norm.mul(unit[0]), norm.mul(unit[1])}, 1);
  batch.set_where(&Matrix::rho, where.unsqueeze(1), rho);
}

void factor_update_(Batch& batch, const Inputs& inputs, const ScaledGradients& gradients) {
  const Options& options = inputs.options;
  const at::Tensor vanished = batch.get(&Matrix::rho).select(1, 0).eq(0);
  set_identity_prior_(batch, options, gradients, vanished.logical_and(gradients.largest.ne(0)));
  FactorUpdate update(batch, options, gradients);
  const Matrix& first = batch.first();
  if (!first.L.defined() || !first.R.defined()) {
    update.one_sided_();
  } else if (options.integrator == Integrator::kKsl) {
    update.ksl_();
  } else if (options.integrator == Integrator::kBug) {
    update.bug_();
  } else if (options.integrator == Integrator::kCoupled) {
    update.coupled_();
  } else {
    update.diagonal_();
  }
}

}  // namespace dykaf::aten
