// The first gradient of a matrix: factors, first bases, first refresh dates.
#include <algorithm>
#include <exception>
#include <vector>

#include "cpu/each_matrix.h"
#include "cpu/first_basis.h"
#include "cpu/linalg.h"
#include "cpu/matrix.h"
#include "cpu/skinny.h"
#include "dykaf/ops.h"
#include "dykaf/schedule.h"

namespace dykaf::cpu {
namespace {

template <typename T>
void first_basis_(const Problem<T>& p, const Options& options, const T* H, Side side) {
  const bool left = side == Side::kLeft;
  const int64_t n = left ? p.m : p.n;
  at::Tensor F = view(left ? p.L : p.R, n, n);
  at::Tensor Q = view(left ? p.Q_L : p.Q_R, n, n);
  // With init "rank_one" the splitting integrators keep the factors at rank one.
  const bool rank_one = options.init == Init::kRankOne && p.L != nullptr && p.R != nullptr &&
                        options.integrator != Integrator::kDiagonal;
  const at::Tensor gradient = view(H, p.m, p.n);
  const auto vectors =
      rank_one ? rank_one_vector(F) : leading_eigenvectors(F, left ? gradient : gradient.t());
  const auto basis = vectors ? complete_basis(*vectors) : std::nullopt;
  if (!basis) {
    Q.zero_().fill_diagonal_(1);
    *p.refresh_fallbacks += 1;
    return;
  }
  Q.copy_(*basis);
  symmetric_product(F, Q.t().contiguous(), full_product(F, Q), MatmulPrecision::kHighest);
}

template <typename T>
void initialize_(const Problem<T>& p, const Options& options, const T* H, T tau,
                 const Workspace<T>& workspace) {
  if (p.is_skinny()) {
    const SkinnyMatrix w(p);
    const SkinnyStart start = initialize_skinny_(w, options, w.oriented(view(H, p.m, p.n)), tau);
    std::copy(start.rho, start.rho + 2, p.rho);
    *p.refresh_fallbacks += start.fallbacks;
  } else {
    set_prior_(p, options, options.init, H, tau);
    // The prior can exceed tau without harm: both are near the gradient's size.
    factor_update_(p, options, H, tau, workspace);
    for (const Side side : {Side::kLeft, Side::kRight}) {
      if ((side == Side::kLeft ? p.L : p.R) != nullptr) first_basis_(p, options, H, side);
    }
  }
  // Last, for a matrix with dates counts as started.
  for (const Side side : {Side::kLeft, Side::kRight}) {
    const auto i = static_cast<size_t>(side);
    p.next_refresh[i] = next_refresh(0, options, p.refresh_offset[i]);
  }
}

}  // namespace

template <typename T>
void reset_(const Problem<T>& p) {
  const auto clear = [](auto* data, int64_t size) {
    if (data != nullptr) std::fill_n(data, size, 0);
  };
  for (T* factor : {p.L, p.Q_L}) clear(factor, p.m * p.m);
  for (T* factor : {p.R, p.Q_R}) clear(factor, p.n * p.n);
  clear(p.basis, 2 * p.skinny_rank * p.long_side());
  clear(p.core, 4 * p.skinny_rank * p.skinny_rank);
  clear(p.flat, 1);
  clear(p.rows, 2);
  clear(p.rho, 2);
  clear(p.next_refresh, 2);
  clear(p.refresh_fallbacks, 1);
}

template <typename T>
void initialize_(std::span<const Problem<T>> problems, const Options& given) {
  Options options = given;
  options.precision = MatmulPrecision::kHighest;
  std::vector<std::exception_ptr> failures(problems.size());
  for_each_matrix(problems, Workspaces<T>(problems), [&](size_t i, const Workspace<T>& workspace) {
    const Problem<T>& p = problems[i];
    if (p.grad_max == 0) return;
    try {
      const T tau = gradient_scale(p, options);
      load_gradient(p, options, tau, workspace.gradient);
      initialize_(p, options, workspace.gradient, tau, workspace);
    } catch (...) {
      failures[i] = std::current_exception();
    }
  });
  for (const std::exception_ptr& failure : failures) {
    if (!failure) continue;
    for (const Problem<T>& p : problems) reset_(p);
    std::rethrow_exception(failure);
  }
}

template void reset_(const Problem<float>&);
template void reset_(const Problem<double>&);
template void initialize_(std::span<const Problem<float>>, const Options&);
template void initialize_(std::span<const Problem<double>>, const Options&);

}  // namespace dykaf::cpu
