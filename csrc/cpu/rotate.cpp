// Q_L^T X Q_R and back.
#include "cpu/each_matrix.h"
#include "cpu/linalg.h"
#include "cpu/matrix.h"
#include "dykaf/ops.h"

namespace dykaf::cpu {

template <typename T>
void rotate(const Problem<T>& p, Rotation rotation, MatmulPrecision precision, const T* input,
            T* output, const Workspace<T>& workspace) {
  const bool into = rotation == Rotation::kIntoBasis;
  at::Tensor X = view(input, p.m, p.n);
  at::Tensor out = view(output, p.m, p.n);
  const at::Tensor turned = view(workspace.turned, p.m, p.n);
  if (p.Q_L != nullptr) {
    const at::Tensor Q_L = view(p.Q_L, p.m, p.m);
    // With two sides the first product must not land in `output`, which may alias `input`.
    at::Tensor left = view(workspace.product, p.m, p.n);
    product(left, into ? Q_L.t() : Q_L, X, precision, turned);
    X = left;
  }
  if (p.Q_R != nullptr) {
    if (X.data_ptr() == out.data_ptr()) X = view(workspace.product, p.m, p.n).copy_(X);
    const at::Tensor Q_R = view(p.Q_R, p.n, p.n);
    product(out, X, into ? Q_R : Q_R.t(), precision, turned);
  } else if (X.data_ptr() != out.data_ptr()) {
    out.copy_(X);
  }
}

template <typename T>
void rotate(std::span<const Problem<T>> problems, Rotation rotation, MatmulPrecision precision,
            const T* const* inputs, T* const* outputs) {
  for_each_matrix(problems, Workspaces<T>(problems), [&](size_t i, const Workspace<T>& workspace) {
    rotate(problems[i], rotation, precision, inputs[i], outputs[i], workspace);
  });
}

template void rotate(const Problem<float>&, Rotation, MatmulPrecision, const float*, float*,
                     const Workspace<float>&);
template void rotate(const Problem<double>&, Rotation, MatmulPrecision, const double*, double*,
                     const Workspace<double>&);
template void rotate(std::span<const Problem<float>>, Rotation, MatmulPrecision,
                     const float* const*, float* const*);
template void rotate(std::span<const Problem<double>>, Rotation, MatmulPrecision,
                     const double* const*, double* const*);

}  // namespace dykaf::cpu
