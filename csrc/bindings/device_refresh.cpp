// One power iteration with orthonormalisation on a device, batched over matrices of one shape and
// without waiting for the device: csrc/cpu/refresh_basis.cpp has the mathematics. Cholesky
// decompositions take the place of Householder's, for products are what a GPU is good at.
#include <ATen/Context.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "bindings/device_ops.h"
#include "bindings/orthonormalize.h"
#include "cpu/linalg.h"
#include "cpu/refresh.h"
#include "cpu/skinny.h"
#include "dykaf/bounds.h"

#if defined(DYKAF_WITH_CUDA)

namespace dykaf::bindings {
namespace {

// Entries of the largest arrays of one batch, which takes a dozen of them.
constexpr int64_t kMaxBatchEntries = int64_t{1} << 24;

using Tensors = std::vector<at::Tensor>;
using Batch = std::vector<const Problem<float>*>;

// One launch for many tensors.
void assign(const Tensors& targets, const at::Tensor& batch) {
  at::_foreach_copy_(targets, batch.unbind(0));
}

// The rows or columns of each matrix of [b, m, n] in an order of its own, [b, m] or [b, n].
at::Tensor rows_of(const at::Tensor& x, const at::Tensor& order) {
  return x.gather(1, order.unsqueeze(2).expand_as(x));
}
at::Tensor columns_of(const at::Tensor& x, const at::Tensor& order) {
  return x.gather(2, order.unsqueeze(1).expand_as(x));
}

// The bases of one side of matrices of one shape. Each array of theirs is one tensor with the batch
// first, so that the number of launches does not grow with the number of matrices.
class RefreshBatch {
 public:
  RefreshBatch(const DeviceGroup& group, Side side, Batch problems)
      : group_(group),
        left_(side == Side::kLeft),
        side_(side),
        m_(problems[0]->m),
        n_(problems[0]->n),
        problems_(std::move(problems)) {}

  // Everything that may fail comes before anything changes.
  void run() {
    const int64_t size = left_ ? m_ : n_;
    const Tensors factors = arrays(left_ ? &Matrix::L : &Matrix::R, {size, size});
    const Tensors bases = arrays(left_ ? &Matrix::Q_L : &Matrix::Q_R, {size, size});
    const at::Tensor F = at::stack(factors);
    const at::Tensor known = cpu::without_noise_rows(F);
    const auto [old_diagonal, sorting] = at::sort(F.diagonal(0, 1, 2), /*stable=*/true, /*dim=*/1,
                                                  /*descending=*/true);
    const auto [Q, sound] = orthonormalize(permuted(known, sorting));
    const at::Tensor moves = unless_skipped(sound);
    const at::Tensor failures = unless_skipped(sound.logical_not()).to(at::kLong);

    // Where a basis must stay nothing is sorted and nothing turns.
    const at::Tensor stays = moves.logical_not().unsqueeze(1);
    const at::Tensor order =
        at::where(stays, at::arange(size, sorting.options()).unsqueeze(0), sorting);
    const at::Tensor turn =
        at::where(stays.unsqueeze(2), at::eye(size, Q.options()).unsqueeze(0), Q);  // Pi^T P
    const at::Tensor P = turn.scatter(1, order.unsqueeze(2).expand_as(turn), turn);
    const at::Tensor upper =
        cpu::full_product(cpu::full_product(turn.transpose(1, 2), permuted(known, order)), turn)
            .triu();
    const at::Tensor symmetric = upper.add(upper.triu(1).transpose(1, 2));
    const at::Tensor new_F = at::where(stays.unsqueeze(2), F, symmetric);
    const at::Tensor growth =
        at::where(stays, at::ones_like(old_diagonal),
                  cpu::growth(group_.options, old_diagonal, new_F.diagonal(0, 1, 2)));
    const at::Tensor new_bases = cpu::full_product(at::stack(bases), P);
    const Drifted drifted = drifted_of(new_bases);

    const Tensors momenta = arrays(&Matrix::exp_avg, {m_, n_});
    const at::Tensor exp_avg = turned_momentum(at::stack(momenta), P, stays.unsqueeze(2));
    const std::vector<Change> moments =
        moved_second_moment(order, growth, exp_avg, stays.unsqueeze(2));

    assign(factors, new_F);
    assign(bases, new_bases);
    for (size_t i = 0; i < drifted.indices.size(); ++i) {
      bases[drifted.indices[i]].copy_(drifted.corrected[static_cast<int64_t>(i)]);
    }
    assign(momenta, exp_avg);
    for (const Change& change : moments) assign(change.targets, change.values);
    Tensors counts;
    const auto options = at::TensorOptions().dtype(at::kLong).device(group_.device);
    for (const Matrix* p : problems_) {
      counts.push_back(at::from_blob(p->refresh_fallbacks, {}, options));
      p->refreshes[static_cast<size_t>(side_)] += 1;
    }
    at::_foreach_add_(counts, failures.unbind(0));
  }

 private:
  using Matrix = Problem<float>;

  // Pi^T F Pi.
  static at::Tensor permuted(const at::Tensor& F, const at::Tensor& order) {
    return rows_of(columns_of(F, order), order);
  }

  // An array of every matrix.
  Tensors arrays(float* Matrix::* array, at::IntArrayRef shape) const {
    Tensors tensors;
    for (const Matrix* p : problems_) {
      tensors.push_back(device_view(p->*array, shape, group_.device));
    }
    return tensors;
  }

  // In a step that is skipped nothing moves, and nothing fails.
  at::Tensor unless_skipped(const at::Tensor& flags) const {
    return group_.skip ? flags.logical_and(group_.skip->eq(0)) : flags;
  }

  // The bases that a correction is due to, and what they become.
  struct Drifted {
    std::vector<size_t> indices;
    at::Tensor corrected;
  };
  Drifted drifted_of(const at::Tensor& bases) const {
    Drifted drifted;
    Tensors chosen;
    for (size_t i = 0; i < problems_.size(); ++i) {
      const int64_t refreshes = problems_[i]->refreshes[static_cast<size_t>(side_)] + 1;
      if (refreshes % cpu::kRefreshesPerCorrection != 0) continue;
      drifted.indices.push_back(i);
      chosen.push_back(bases[static_cast<int64_t>(i)]);
    }
    if (!chosen.empty()) drifted.corrected = cpu::orthonormalized(at::stack(chosen));
    return drifted;
  }

  // Without what is rounding in it, but where it stays.
  at::Tensor turned_momentum(const at::Tensor& exp_avg, const at::Tensor& P,
                             const at::Tensor& stays) const {
    const at::Tensor turned =
        left_ ? cpu::full_product(P.transpose(1, 2), exp_avg) : cpu::full_product(exp_avg, P);
    const at::Tensor noise = exp_avg.abs()
                                 .amax(at::IntArrayRef({1, 2}), /*keepdim=*/true)
                                 .mul_(rounding_share<float>(left_ ? m_ : n_));
    const at::Tensor rounding = turned.abs().lt(noise).logical_and(stays.logical_not());
    return at::where(rounding, at::zeros_like(turned), turned);
  }

  at::Tensor steps() const {
    Tensors tensors;
    const auto options = at::TensorOptions().dtype(at::kFloat).device(group_.device);
    for (const Matrix* p : problems_) tensors.push_back(at::from_blob(p->step, {}, options));
    return at::stack(tensors);
  }

  struct Change {
    Tensors targets;
    at::Tensor values;
  };
  std::vector<Change> moved_second_moment(const at::Tensor& order, const at::Tensor& growth,
                                          const at::Tensor& exp_avg,
                                          const at::Tensor& stays) const {
    const Matrix& first = *problems_[0];
    if (first.is_skinny()) return {moved_skinny_moment(order, growth, exp_avg, stays)};
    if (first.exp_avg_sq != nullptr) {
      const Tensors moments = arrays(&Matrix::exp_avg_sq, {m_, n_});
      const at::Tensor v = at::stack(moments);
      const at::Tensor moved =
          (left_ ? rows_of(v, order) : columns_of(v, order)).mul_(growth.unsqueeze(left_ ? 2 : 1));
      const at::Tensor floor =
          cpu::momentum_floors(group_.options, steps()).to(at::kFloat).unsqueeze(1).unsqueeze(2);
      const at::Tensor least = exp_avg.square().mul_(floor);
      return {{moments, at::where(stays, moved, at::maximum(moved, least))}};
    }
    const Tensors rows = arrays(&Matrix::exp_avg_sq_row, {m_});
    const Tensors cols = arrays(&Matrix::exp_avg_sq_col, {n_});
    const Tensors& vectors = left_ ? rows : cols;
    const Tensors& others = left_ ? cols : rows;
    const at::Tensor old = at::stack(vectors).gather(1, order).to(at::kDouble);
    const at::Tensor moved = old.mul(growth);
    if (group_.options.second_moment == SecondMoment::kRankOne) {
      const at::Tensor norm = at::linalg_vector_norm(moved, 2, at::IntArrayRef({1}));
      const at::Tensor divisor = at::where(norm.gt(0), norm, at::ones_like(norm));
      const Tensors scale = scales();
      return {{vectors, moved.div(divisor.unsqueeze(1)).to(at::kFloat)},
              {scale, at::stack(scale).mul_(divisor.sqrt())}};
    }
    // Both means move alike, for the mean of the row vector divides row_i col_j.
    const at::Tensor total = old.sum(1);
    const at::Tensor ratio = at::where(total.gt(0), moved.sum(1).div(total), at::ones_like(total));
    return {{vectors, moved.to(at::kFloat)},
            {others, at::stack(others).mul_(ratio.to(at::kFloat).unsqueeze(1))}};
  }

  // Along the short side; exp_avg is [m, n] as the parameter is.
  Change moved_skinny_moment(const at::Tensor& order, const at::Tensor& growth,
                             const at::Tensor& exp_avg, const at::Tensor& stays) const {
    const Matrix& first = *problems_[0];
    const Tensors moments =
        arrays(&Matrix::exp_avg_sq, {first.short_side(), first.skinny_rank + 1});
    const at::Tensor moved = rows_of(at::stack(moments), order).mul_(growth.unsqueeze(2));
    const at::Tensor V = at::stack(arrays(&Matrix::basis, {first.rows[0], first.long_side()}));
    const at::Tensor bounded = moved.clone();
    cpu::bound_second_moment_(bounded, group_.options, left_ ? exp_avg : exp_avg.mT(), V, steps());
    return {moments, at::where(stays, moved, bounded)};
  }

  Tensors scales() const {
    const auto options = at::TensorOptions().dtype(at::kDouble).device(group_.device);
    Tensors tensors;
    for (const Matrix* p : problems_) {
      tensors.push_back(at::from_blob(p->exp_avg_sq_scale, {}, options));
    }
    return tensors;
  }

  const DeviceGroup& group_;
  bool left_;
  Side side_;
  int64_t m_;
  int64_t n_;
  Batch problems_;
};

// The long sides of skinny matrices of one shape with the same rows in use. Also in a step that is
// skipped: the host counts the rows of the basis.
void refresh_long_sides_(const DeviceGroup& group, const Batch& problems) {
  std::vector<cpu::SkinnyMatrix> matrices;
  for (const Problem<float>* p : problems) matrices.emplace_back(*p, group.device);
  cpu::refresh_long_(matrices, group.options);
}

// Runs the problems that the key does not tell apart together; entries(problem) are those of its
// largest array.
template <typename Key, typename Entries, typename Run>
void for_each_batch(const std::map<Key, Batch>& batches, const Entries& entries, const Run& run) {
  for (const auto& [key, problems] : batches) {
    const int64_t fitting = kMaxBatchEntries / entries(*problems[0]);
    const auto most = static_cast<size_t>(std::max<int64_t>(1, fitting));
    for (size_t begin = 0; begin < problems.size(); begin += most) {
      const auto end = std::min(problems.size(), begin + most);
      run(Batch(problems.begin() + begin, problems.begin() + end));
    }
  }
}

}  // namespace

std::vector<const Problem<float>*> refresh_basis_on_device_(const DeviceGroup& group, Side side) {
  const c10::DeviceGuard guard(group.device);
  // Rounding here would turn the bases away from orthogonality for good; where it gets by this
  // guard, orthonormalize() sees it.
  const at::NoTF32Guard full_precision;
  std::map<std::array<int64_t, 3>, Batch> dense;  // by shape and orthonormal rows of long sides
  std::map<std::array<int64_t, 4>, Batch> long_sides;  // by shape and rows in use
  for (const Problem<float>& p : group.problems) {
    if ((side == Side::kLeft ? p.L : p.R) != nullptr) {
      dense[{p.m, p.n, p.is_skinny() ? p.rows[0] : 0}].push_back(&p);
    } else if (p.is_skinny()) {
      long_sides[{p.m, p.n, p.rows[0], p.rows[1]}].push_back(&p);
    }
  }
  Batch failures;
  // Without memory, say: a step can do without a refresh.
  const auto or_stay = [&](const Batch& batch, const auto& run) {
    try {
      run();
    } catch (const std::exception&) {
      for (const Problem<float>* p : batch) {
        const auto options = at::TensorOptions().dtype(at::kLong).device(group.device);
        at::from_blob(p->refresh_fallbacks, {}, options).add_(1);
        p->refreshes[static_cast<size_t>(side)] += 1;
        if (p->is_full()) cpu::forget_gradients_(cpu::SkinnyMatrix(*p, group.device));
        failures.push_back(p);
      }
    }
  };
  for_each_batch(
      dense,
      [&](const Problem<float>& p) {
        const int64_t n = side == Side::kLeft ? p.m : p.n;
        return std::max(n * n, p.size());
      },
      [&](const Batch& batch) { or_stay(batch, [&] { RefreshBatch(group, side, batch).run(); }); });
  for_each_batch(
      long_sides, [](const Problem<float>& p) { return 2 * p.skinny_rank * p.long_side(); },
      [&](const Batch& batch) { or_stay(batch, [&] { refresh_long_sides_(group, batch); }); });
  return failures;
}

}  // namespace dykaf::bindings

#endif
