// The step of a skinny matrix: dykaf/types.h has its state, docs/algorithm.md the mathematics.
// Within this file the matrix is seen with the short side first, [s, l], whichever way it lies.
#include <algorithm>
#include <cmath>

#include "aten/products.h"
#include "cpu/adam.h"
#include "cpu/linalg.h"
#include "cpu/loops.h"
#include "cpu/matrix.h"

namespace dykaf::cpu {
namespace {

template <typename T>
DYKAF_WIDE void drop_noise_(T* x, T noise, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] = std::abs(x[i]) < noise ? T(0) : x[i];
}

// out [cols, rows] = the transpose of x [rows, cols].
template <typename T>
void transpose(const T* x, int64_t rows, int64_t cols, T* out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) out[j * rows + i] = x[i * cols + j];
  }
}

// moment <- beta2 moment + (1 - beta2) (tau x)^2; returns the inverse of its root after correction.
template <typename T>
T inverse_root_(T& moment, T x, const AdamScalars<T>& s) {
  const T g = x * s.tau;
  moment = s.beta2 * moment + s.one_minus_beta2 * g * g;
  return T(1) / (std::sqrt(moment) * s.correction2 + s.eps);
}

// exp_avg <- blended with g = tau x; m = the numerator of the update.
template <typename T>
DYKAF_WIDE void momentum_range_(T* exp_avg, const T* x, T* m, int64_t size,
                                const AdamScalars<T>& s) {
  for (int64_t j = 0; j < size; ++j) {
    const T g = x[j] * s.tau;
    exp_avg[j] = blend_momentum(exp_avg[j], g, s);
    m[j] = exp_avg[j] * s.of_momentum + g * s.of_gradient;
  }
}

// What lies outside of V: a mean over `num` coordinates. Below the bound on the rounding of the
// difference it is not known.
double mean_outside(double total, double inside, double least_share, int64_t num) {
  return std::max(total - inside, total * least_share) / static_cast<double>(num);
}

template <typename T>
class SkinnyStep {
 public:
  SkinnyStep(const Problem<T>& p, const Options& options, T tau, const Workspace<T>& workspace)
      : p_(p),
        options_(options),
        tau_(static_cast<double>(tau)),
        s_(p.short_side()),
        l_(p.long_side()),
        inner_(p.rows[0]),
        Q_(view(p.is_wide() ? p.Q_L : p.Q_R, s_, s_)),
        V_(view(p.basis, inner_, l_)),
        X_(workspace.turned),
        M_(workspace.product),
        update_(workspace.gradient),
        gram_(p.is_wide() ? workspace.left : workspace.right),
        XV_(workspace.skinny),
        MV_(XV_ + s_ * p.skinny_rank),
        beyond_(MV_ + s_ * p.skinny_rank),
        scalars_(p, options, tau) {}

  // X = Q^T H.
  void rotate(const T* H) {
    if (!p_.is_wide()) {
      transpose(H, l_, s_, M_);
      H = M_;
    }
    aten::multiply(view(X_, s_, l_), Q_.t(), view(H, s_, l_));
    drop_noise_(X_, scalars_.noise, s_ * l_);
  }

  // The update in the basis of the short side: (M V^T within) V + (M - M V^T V) beyond.
  void adam_update_() {
    aten::multiply(view(XV_, s_, inner_), view(X_, s_, l_), V_.t());
    drop_noise_(XV_, scalars_.noise * std::sqrt(static_cast<T>(l_)), s_ * inner_);
    for (int64_t i = 0; i < s_; ++i) advance_moments_(i);
    advance_momentum_();
    aten::multiply(view(MV_, s_, inner_), view(M_, s_, l_), V_.t());
    for (int64_t i = 0; i < s_; ++i) weigh_(i);
    aten::multiply(view(update_, s_, l_), view(MV_, s_, inner_), V_);
    double sum = 0;
    for (int64_t i = 0; i < s_; ++i) {
      combine_range_(update_ + i * l_, M_ + i * l_, T(1), beyond_[i], l_);
      sum += dot(update_ + i * l_, update_ + i * l_, l_);
    }
    *p_.update_rms = static_cast<float>(std::sqrt(sum / static_cast<double>(p_.size())));
  }

  // In the original coordinates.
  void turn_back(T* out) const {
    const at::Tensor update = view(update_, s_, l_);
    if (p_.is_wide()) return aten::multiply(view(out, s_, l_), Q_, update);
    aten::multiply(view(M_, s_, l_), Q_, update);
    transpose(M_, s_, l_, out);
  }

  // The averages of both sides, and the gradient's rows into the basis.
  void factor_update_() {
    const at::Tensor X = view(X_, s_, l_);
    symmetric_product(view(gram_, s_, s_), X, X.t(), MatmulPrecision::kHighest);
    const size_t short_idx = p_.is_wide() ? 0 : 1;
    const size_t long_idx = 1 - short_idx;
    const double gain = 1 - options_.factor_beta;

    double trace = 0;
    for (int64_t i = 0; i < s_; ++i) trace += static_cast<double>(gram_[i * (s_ + 1)]);

    // A factor whose new norm would be zero stays.
    T* factor = p_.is_wide() ? p_.L : p_.R;
    combine_range_(gram_, factor, static_cast<T>(gain / static_cast<double>(l_)),
                   static_cast<T>(kept(short_idx)), s_ * s_);
    const double norm = std::sqrt(dot(gram_, gram_, s_ * s_));
    if (norm > 0) {
      for (int64_t i = 0; i < s_ * s_; ++i) {
        factor[i] = static_cast<T>(static_cast<double>(gram_[i]) / norm);
      }
    }

    const double row_gain = gain / static_cast<double>(s_);
    const double kept_long = kept(long_idx);
    trace = trace * row_gain + kept_long;
    if (trace > 0) {
      const T decay = static_cast<T>(kept_long / trace);
      const int64_t side = 2 * p_.skinny_rank;
      *p_.flat *= decay;
      for (int64_t i = 0; i < side * side; ++i) p_.core[i] *= decay;
      for (int64_t i = p_.rows[1]; i < p_.rows[1] + s_; ++i) {
        p_.core[i * (side + 1)] = static_cast<T>(row_gain / trace);
      }
    }
    std::copy(X_, X_ + s_ * l_, p_.basis + p_.rows[1] * l_);
    p_.rows[1] += s_;
    if (norm > 0) p_.rho[short_idx] = tau_ * std::sqrt(norm);
    if (trace > 0) p_.rho[long_idx] = tau_ * std::sqrt(trace);
  }

 private:
  // XV's row becomes the inverse roots of its second moments.
  void advance_moments_(int64_t i) {
    const T* x = X_ + i * l_;
    T* within = XV_ + i * inner_;
    T* moments = p_.exp_avg_sq + i * (p_.skinny_rank + 1);
    const double rest = mean_outside(dot(x, x, l_), dot(within, within, inner_),
                                     least_outside<T>(options_), l_ - inner_);
    for (int64_t k = 0; k < inner_; ++k) within[k] = inverse_root_(moments[k], within[k], scalars_);
    beyond_[i] = inverse_root_(moments[p_.skinny_rank], static_cast<T>(std::sqrt(rest)), scalars_);
  }

  void advance_momentum_() {
    if (p_.is_wide()) return momentum_range_(p_.exp_avg, X_, M_, s_ * l_, scalars_);
    transpose(p_.exp_avg, l_, s_, update_);
    momentum_range_(update_, X_, M_, s_ * l_, scalars_);
    transpose(update_, s_, l_, p_.exp_avg);
  }

  void weigh_(int64_t i) {
    const T* m = M_ + i * l_;
    const T* within = XV_ + i * inner_;
    T* coordinates = MV_ + i * inner_;
    const double length = std::sqrt(dot(m, m, l_));
    drop_noise_(coordinates, static_cast<T>(length * rounding_share<T>(1)), inner_);
    const T beyond = beyond_[i];
    for (int64_t k = 0; k < inner_; ++k) {
      const T wanted = std::clamp(coordinates[k] * within[k], -scalars_.bound, scalars_.bound);
      coordinates[k] = wanted - coordinates[k] * beyond;
    }
  }

  double kept(size_t side) const {
    const double ratio = p_.rho[side] / tau_;
    return ratio * ratio * options_.factor_beta;
  }

  const Problem<T>& p_;
  const Options& options_;
  const double tau_;
  const int64_t s_;
  const int64_t l_;
  const int64_t inner_;
  const at::Tensor Q_;
  const at::Tensor V_;
  T* const X_;       // [s, l], the rotated gradient over tau
  T* const M_;       // [s, l]
  T* const update_;  // [s, l]
  T* const gram_;    // [s, s]
  T* const XV_;      // [s, inner]
  T* const MV_;      // [s, inner]
  T* const beyond_;  // [s]
  const AdamScalars<T> scalars_;
};

}  // namespace

template <typename T>
void skinny_step_(const Problem<T>& p, const Options& options, const T* H, T tau, T* update,
                  const Workspace<T>& workspace) {
  *p.step += 1;
  SkinnyStep<T> step(p, options, tau, workspace);
  step.rotate(H);
  step.adam_update_();
  step.turn_back(update);
  step.factor_update_();
}

template void skinny_step_(const Problem<float>&, const Options&, const float*, float, float*,
                           const Workspace<float>&);
template void skinny_step_(const Problem<double>&, const Options&, const double*, double, double*,
                           const Workspace<double>&);

}  // namespace dykaf::cpu
