// X <- X_k times its scale, in place (dykaf/newton_schulz.h).
#include "dykaf/newton_schulz.h"

#include <algorithm>
#include <cmath>

#include "aten/products.h"
#include "cpu/each_matrix.h"
#include "cpu/linalg.h"
#include "cpu/loops.h"
#include "cpu/matrix.h"
#include "dykaf/ops.h"

namespace dykaf::cpu {
namespace {

// X <- scale (a X + X B) or scale (a X + B X), B [s, s] on the short side; `scratch` has the size
// of X.
template <typename T>
void multiply_short_side_(const Problem<T>& p, T* X, const at::Tensor& B, double scale, T* scratch,
                          MatmulPrecision precision) {
  const at::Tensor x = view(X, p.m, p.n);
  const at::Tensor out = view(scratch, p.m, p.n);
  if (p.m <= p.n) {
    product(out, B, x, precision, out);
  } else if (p.n > kFewColumns) {
    product(out, x, B, precision, out);
  } else {
    const at::Tensor transposed = view(scratch, p.n, p.m);
    product(transposed, B, x.t(), precision, transposed);
    x.mul_(scale * NewtonSchulz::kA).add_(transposed.t(), scale);
    return;
  }
  combine_(X, scratch, scale * NewtonSchulz::kA, scale, p.size());
}

}  // namespace

template <typename T>
void orthogonalize_(const Problem<T>& p, const Options& options, T* X,
                    const Workspace<T>& workspace) {
  const double length = frobenius_norm(X, p.size());
  if (!(length > 0)) {
    *p.update_rms = static_cast<float>(length);
    return;
  }
  const double root_size = std::sqrt(static_cast<double>(p.size()));
  const double least = full_rms(options);
  const double fade = least > 0 ? std::min(1.0, length / root_size / least) : 1.0;
  const double last_scale = orthogonal_scale(p.m, p.n) * fade;
  // In double, for in float the inverse of a denormal length is infinite.
  const double inverse = 1 / length;
  for_chunks(p.size(), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      X[i] = static_cast<T>(static_cast<double>(X[i]) * inverse);
    }
  });
  const int64_t s = p.short_side();
  const at::Tensor x = view(X, p.m, p.n);
  const at::Tensor wide = p.m <= p.n ? x : x.t();
  const at::Tensor A = view(workspace.product, s, s);
  const at::Tensor B = view(workspace.turned, s, s);
  for (int64_t i = 0; i < options.orthogonalize; ++i) {
    symmetric_product(A, wide, wide.t(), options.precision);
    // X stands for X / t, A for A / t^2.
    const bool has_bound = i == 0 && starts_from_gram(options);
    const double t_squared = has_bound ? frobenius_norm(workspace.product, s * s) : 1.0;
    symmetric_product(B, A, A, options.precision);
    combine_(workspace.turned, workspace.product, NewtonSchulz::kC / (t_squared * t_squared),
             NewtonSchulz::kB / t_squared, s * s);
    const double scale = (i == options.orthogonalize - 1 ? last_scale : 1.0) / std::sqrt(t_squared);
    multiply_short_side_(p, X, B, scale, workspace.product, options.precision);
  }
  *p.update_rms = static_cast<float>(frobenius_norm(X, p.size()) / root_size);
}

template <typename T>
void orthogonalize_(std::span<const Problem<T>> problems, const Options& options,
                    T* const* updates) {
  for_each_matrix(problems, Workspaces<T>(problems), [&](size_t i, const Workspace<T>& workspace) {
    orthogonalize_(problems[i], options, updates[i], workspace);
  });
}

template void orthogonalize_(const Problem<float>&, const Options&, float*,
                             const Workspace<float>&);
template void orthogonalize_(const Problem<double>&, const Options&, double*,
                             const Workspace<double>&);
template void orthogonalize_(std::span<const Problem<float>>, const Options&, float* const*);
template void orthogonalize_(std::span<const Problem<double>>, const Options&, double* const*);

}  // namespace dykaf::cpu
