// X <- orthogonal_scale X_k, in place (dykaf/newton_schulz.h).
#include "dykaf/newton_schulz.h"

#include <cmath>

#include "aten/products.h"
#include "cpu/each_matrix.h"
#include "cpu/linalg.h"
#include "cpu/loops.h"
#include "cpu/matrix.h"
#include "dykaf/ops.h"

namespace dykaf::cpu {
namespace {

// X <- a X + X B or a X + B X, B [s, s] on the short side; `scratch` has the size of X.
template <typename T>
void multiply_short_side_(const Problem<T>& p, T* X, const at::Tensor& B, T* scratch,
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
    x.mul_(NewtonSchulz::kA).add_(transposed.t());
    return;
  }
  combine_(X, scratch, NewtonSchulz::kA, 1, p.size());
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
    if (i == 0 && starts_from_gram(options)) {
      const double bound = std::sqrt(frobenius_norm(workspace.product, s * s));
      combine_(X, X, 1 / bound, 0, p.size());
      combine_(workspace.product, workspace.product, 1 / (bound * bound), 0, s * s);
    }
    symmetric_product(B, A, A, options.precision);
    combine_(workspace.turned, workspace.product, NewtonSchulz::kC, NewtonSchulz::kB, s * s);
    multiply_short_side_(p, X, B, workspace.product, options.precision);
  }
  const double direction_rms = length / std::sqrt(static_cast<double>(p.size()));
  combine_(X, X, orthogonal_scale(p.m, p.n, direction_rms, options), 0, p.size());
  *p.update_rms =
      static_cast<float>(frobenius_norm(X, p.size()) / std::sqrt(static_cast<double>(p.size())));
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
