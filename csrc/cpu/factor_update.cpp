// The integrator step of L, R and rho: the rank-one projector-splitting step of vec(L) vec(R)^T
// towards beta rho^2 L (x) R + (1 - beta) g g^T (Yudin et al., arXiv 2511.06477; ksl: Lubich &
// Oseledets 2014; bug: Ceruti & Lubich 2022). In units of tau, a = beta (rho / tau)^2 and
// b = 1 - beta.
#include <cmath>
#include <limits>
#include <vector>

#include "aten/ops.h"
#include "cpu/each_matrix.h"
#include "cpu/linalg.h"
#include "cpu/loops.h"
#include "cpu/matrix.h"
#include "cpu/whitening.h"
#include "dykaf/ops.h"
#include "dykaf/prior.h"

namespace dykaf::cpu {
namespace {

template <typename T>
double inner(const T* x, const T* y, int64_t size) {
  return sum_chunks<1>(size, [&](int64_t begin, int64_t end) {
    return std::array{dot(x + begin, y + begin, end - begin)};
  })[0];
}

// Inner products of a factor F and its increment A, both n x n. Norms and products of a F + b A
// follow from them without cancellation, for all terms are non-negative.
struct Products {
  double FF;
  double FA;
  double AA;

  double norm(double a, double b) const {
    return std::sqrt(a * a * FF + 2 * a * b * FA + b * b * AA);
  }
  double with_factor(double a, double b) const { return a * FF + b * FA; }
};

template <typename T>
Products products(const T* factor, const T* increment, int64_t n) {
  const auto sums = sum_chunks<3>(n * n, [&](int64_t begin, int64_t end) {
    const int64_t size = end - begin;
    const T* F = factor + begin;
    const T* A = increment + begin;
    return std::array{dot(F, F, size), dot(F, A, size), dot(A, A, size)};
  });
  return {sums[0], sums[1], sums[2]};
}

// factor = (a factor + b increment) / norm.
template <typename T>
void blend_(T* factor, const T* increment, double a, double b, double norm, int64_t n) {
  // Where the gain would be infinite the increment is as good as zero.
  const double gain = std::min(b / norm, static_cast<double>(std::numeric_limits<T>::max()));
  combine_(factor, increment, a / norm, gain, n * n);
}

template <typename T>
void set_rho(const Problem<T>& p, double rho) {
  p.rho[0] = rho;
  p.rho[1] = rho;
}

// The gradient terms of the two factors; M a symmetric matrix in place of the other factor.
template <typename T>
struct GradientProducts {
  const Problem<T>& p;
  MatmulPrecision precision;
  at::Tensor H;        // [m, n]
  at::Tensor scratch;  // [m, n]
  at::Tensor turned;   // [m, n]

  // out = H M H^T, M [n, n], out [m, m].
  void left(const at::Tensor& M, T* out) {
    product(scratch, H, M, precision, turned);
    symmetric_product(view(out, p.m, p.m), scratch, H.t(), precision);
  }

  // out = H^T M H, M [m, m], out [n, n].
  void right(const at::Tensor& M, T* out) {
    product(scratch, M, H, precision, turned);
    symmetric_product(view(out, p.n, p.n), H.t(), scratch, precision);
  }
};

template <typename T>
void ksl_(const Problem<T>& p, double beta, double tau, GradientProducts<T> gradient,
          const Workspace<T>& workspace) {
  const double a = beta * (p.rho[0] / tau) * (p.rho[0] / tau);
  const double b = 1 - beta;

  gradient.left(view(p.R, p.n, p.n), workspace.left);
  const Products K = products(p.L, workspace.left, p.m);
  const double norm_K = K.norm(a, b);
  if (!(norm_K > 0)) return;
  const double c = a * K.with_factor(a, b) / norm_K;
  blend_(p.L, workspace.left, a, b, norm_K, p.m);

  gradient.right(view(p.L, p.m, p.m), workspace.right);
  const double s = products(p.R, workspace.right, p.n).norm(c, b);
  if (!(s > 0)) return;
  blend_(p.R, workspace.right, c, b, s, p.n);
  set_rho(p, tau * std::sqrt(s));
}

// <A, H B H^T> for A [m, m], B [n, n], by the cheapest of three forms (A = H R H^T, B = H^T L H).
template <typename T>
double coupling(const Problem<T>& p, GradientProducts<T>& gradient, const Workspace<T>& workspace) {
  const at::Tensor A = view(workspace.left, p.m, p.m);
  const at::Tensor B = view(workspace.right, p.n, p.n);
  const at::Tensor& H = gradient.H;
  const double m = static_cast<double>(p.m);
  const double n = static_cast<double>(p.n);
  const double small = std::min(m, n);
  if (2 * small * small < m * n) {
    // H B H^T = C L C with C = H H^T, and the mirror image.
    const bool left = p.m <= p.n;
    const int64_t size = left ? p.m : p.n;
    const at::Tensor C = view(workspace.update, size, size);
    const at::Tensor CF = view(workspace.update + size * size, size, size);
    const at::Tensor CFC = view(workspace.product, size, size);
    const at::Tensor turned = view(workspace.turned, size, size);
    product(C, left ? H : H.t(), left ? H.t() : H, gradient.precision, turned);
    product(CF, C, view(left ? p.L : p.R, size, size), gradient.precision, turned);
    product(CFC, CF, C, gradient.precision, turned);
    return inner(left ? workspace.left : workspace.right, workspace.product, size * size);
  }
  at::Tensor AH = gradient.scratch;
  at::Tensor HB = view(workspace.update, p.m, p.n);
  product(AH, A, H, gradient.precision, gradient.turned);
  product(HB, H, B, gradient.precision, gradient.turned);
  return inner(AH.const_data_ptr<T>(), HB.const_data_ptr<T>(), p.size());
}

template <typename T>
void bug_(const Problem<T>& p, double beta, double tau, GradientProducts<T> gradient,
          const Workspace<T>& workspace) {
  const double a = beta * (p.rho[0] / tau) * (p.rho[0] / tau);
  const double b = 1 - beta;

  gradient.left(view(p.R, p.n, p.n), workspace.left);
  gradient.right(view(p.L, p.m, p.m), workspace.right);
  const Products K = products(p.L, workspace.left, p.m);
  const Products J = products(p.R, workspace.right, p.n);
  const double norm_K = K.norm(a, b);
  const double norm_J = J.norm(a, b);
  const double q = coupling(p, gradient, workspace);
  const double with_gradient = a * a * K.FA + a * b * (K.AA + J.AA) + b * b * q;
  const double s =
      (a * K.with_factor(a, b) * J.with_factor(a, b) + b * with_gradient) / (norm_K * norm_J);
  // Where K or J vanishes so does the numerator: s is NaN and the factors stay.
  if (!(s > 0)) return;
  blend_(p.L, workspace.left, a, b, norm_K, p.m);
  blend_(p.R, workspace.right, a, b, norm_J, p.n);
  set_rho(p, tau * std::sqrt(s));
}

// F <- beta rho^2 F + b tau^2 increment / size, in unit norm with rho to match. Damping adds that
// multiple of the mean eigenvalue of rho^2 F to the increment / size.
template <typename T>
void average_(T* factor, T* increment, int64_t n, const Options& options, double tau, double size,
              double* rho) {
  const double squared = (*rho / tau) * (*rho / tau);
  const double a = options.factor_beta * squared;
  const double b = (1 - options.factor_beta) / size;
  if (options.damping > 0) {
    const double ridge = options.damping * squared * mean_eigenvalue(factor, n) * size;
    for (int64_t i = 0; i < n; ++i) increment[i * (n + 1)] += static_cast<T>(ridge);
  }
  const double norm = products(factor, increment, n).norm(a, b);
  if (!(norm > 0)) return;
  blend_(factor, increment, a, b, norm, n);
  *rho = tau * std::sqrt(norm);
}

template <typename T>
void diagonal_(const Problem<T>& p, const Options& options, double tau,
               GradientProducts<T> gradient, const Workspace<T>& workspace) {
  const at::Tensor& H = gradient.H;
  symmetric_product(view(workspace.left, p.m, p.m), H, H.t(), gradient.precision);
  symmetric_product(view(workspace.right, p.n, p.n), H.t(), H, gradient.precision);
  average_(p.L, workspace.left, p.m, options, tau, static_cast<double>(p.n), &p.rho[0]);
  average_(p.R, workspace.right, p.n, options, tau, static_cast<double>(p.m), &p.rho[1]);
}

// The same, each with the inverse of the other factor as its metric: the right one's is the new L.
template <typename T>
void coupled_(const Problem<T>& p, const Options& options, double tau, GradientProducts<T> gradient,
              const Workspace<T>& workspace) {
  const T* H = gradient.H.template const_data_ptr<T>();
  const T* none = nullptr;
  T* A = workspace.product;
  const at::Tensor weighted = view(A, p.m, p.n);
  const std::vector<T> of_columns = inverse_powers(p.R, p.n, kMetricExponent);
  multiply_sides(H, none, of_columns.data(), p.m, p.n, A);
  symmetric_product(view(workspace.left, p.m, p.m), weighted, weighted.t(), gradient.precision);
  average_(p.L, workspace.left, p.m, options, tau, static_cast<double>(p.n), &p.rho[0]);
  const std::vector<T> of_rows = inverse_powers(p.L, p.m, kMetricExponent);
  multiply_sides(H, of_rows.data(), none, p.m, p.n, A);
  symmetric_product(view(workspace.right, p.n, p.n), weighted.t(), weighted, gradient.precision);
  average_(p.R, workspace.right, p.n, options, tau, static_cast<double>(p.m), &p.rho[1]);
}

// The other side is the scaled identity of unit norm, which is not stored.
template <typename T>
void one_sided_(const Problem<T>& p, const Options& options, double tau,
                GradientProducts<T> gradient, const Workspace<T>& workspace) {
  const bool left = p.L != nullptr;
  const int64_t n = left ? p.m : p.n;
  const at::Tensor& H = gradient.H;
  T* increment = left ? workspace.left : workspace.right;
  symmetric_product(view(increment, n, n), left ? H : H.t(), left ? H.t() : H, gradient.precision);
  average_(left ? p.L : p.R, increment, n, options, tau,
           std::sqrt(static_cast<double>(left ? p.n : p.m)), &p.rho[0]);
  p.rho[1] = p.rho[0];
}

template <typename T>
void set_scaled_identity(T* factor, int64_t n) {
  view(factor, n, n).zero_().fill_diagonal_(1 / std::sqrt(static_cast<double>(n)));
}

// The factors start anew.
template <typename T>
void set_identity_prior_(const Problem<T>& p, const Options& options, const T* H, T tau) {
  const bool two_sided = p.L != nullptr && p.R != nullptr;
  if (p.L != nullptr) set_scaled_identity(p.L, p.m);
  if (p.R != nullptr) set_scaled_identity(p.R, p.n);
  const double norm = static_cast<double>(tau) * frobenius_norm(H, p.size());
  const auto rho = prior_rho(options, p.m, p.n, two_sided, norm);
  std::copy(rho.begin(), rho.end(), p.rho);
}

}  // namespace

template <typename T>
void factor_update_(const Problem<T>& p, const Options& options, const T* H, T tau,
                    const Workspace<T>& workspace) {
  const double beta = options.factor_beta;
  if (p.grad_max == 0) {
    p.rho[0] *= std::sqrt(beta);
    p.rho[1] *= std::sqrt(beta);
    return;
  }
  if (p.rho[0] == 0) set_identity_prior_(p, options, H, tau);

  const GradientProducts<T> gradient{p, options.precision, view(H, p.m, p.n),
                                     view(workspace.product, p.m, p.n),
                                     view(workspace.turned, p.m, p.n)};
  if (p.L == nullptr || p.R == nullptr) {
    one_sided_(p, options, tau, gradient, workspace);
  } else if (options.integrator == Integrator::kKsl) {
    ksl_(p, beta, tau, gradient, workspace);
  } else if (options.integrator == Integrator::kBug) {
    bug_(p, beta, tau, gradient, workspace);
  } else if (options.integrator == Integrator::kCoupled) {
    coupled_(p, options, tau, gradient, workspace);
  } else {
    diagonal_(p, options, tau, gradient, workspace);
  }
}

template <typename T>
void factor_update_(std::span<const Problem<T>> problems, const Options& options) {
  if (options.roots == Roots::kExact) {
    for (const Problem<T>& p : problems)
      aten::factor_update_({aten::Matrix(p)}, {.options = options});
    return;
  }
  for_each_matrix(problems, Workspaces<T>(problems), [&](size_t i, const Workspace<T>& workspace) {
    const Problem<T>& p = problems[i];
    const T tau = gradient_scale(p, options);
    load_gradient(p, options, tau, workspace.gradient);
    factor_update_(p, options, workspace.gradient, tau, workspace);
  });
}

template void factor_update_(const Problem<float>&, const Options&, const float*, float,
                             const Workspace<float>&);
template void factor_update_(const Problem<double>&, const Options&, const double*, double,
                             const Workspace<double>&);
template void factor_update_(std::span<const Problem<float>>, const Options&);
template void factor_update_(std::span<const Problem<double>>, const Options&);

}  // namespace dykaf::cpu
