// One power iteration with orthonormalisation on a device, batched over bases of one size and
// without waiting for the device: csrc/cpu/refresh_basis.cpp has the mathematics. Cholesky
// decompositions take the place of Householder's, for products are what a GPU is good at.
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <c10/core/DeviceGuard.h>

#include <array>
#include <map>

#include "bindings/device_ops.h"
#include "bindings/orthonormalize.h"
#include "cpu/matmul_precision.h"
#include "cpu/refresh.h"
#include "cpu/skinny.h"

#if defined(DYKAF_WITH_CUDA)

namespace dykaf::bindings {
namespace {

// Bases of one batch, by memory: a batch takes a dozen arrays of this many entries.
constexpr int64_t kMaxBatchEntries = int64_t{1} << 24;

// The bases of one side and size, [b, n, n] each.
class RefreshBatch {
 public:
  RefreshBatch(const DeviceGroup& group, Side side, std::vector<const Problem<float>*> problems)
      : group_(group), left_(side == Side::kLeft), side_(side), problems_(std::move(problems)) {}

  void run() {
    const int64_t n = size_of(*problems_[0]);
    std::vector<at::Tensor> factors;
    std::vector<at::Tensor> bases;
    for (const auto* p : problems_) {
      factors.push_back(device_view(left_ ? p->L : p->R, {n, n}, group_.device));
      bases.push_back(device_view(left_ ? p->Q_L : p->Q_R, {n, n}, group_.device));
    }
    const at::Tensor F = at::stack(factors);
    const auto [old_diagonal, sorting] = at::sort(F.diagonal(0, 1, 2), /*stable=*/true, /*dim=*/1,
                                                  /*descending=*/true);
    const auto [Q, sound] = orthonormalize(permuted(F, sorting));
    const at::Tensor moves = unless_skipped(sound);
    count_refreshes(unless_skipped(sound.logical_not()));

    // Where a basis must stay nothing is sorted and nothing turns.
    const at::Tensor stays = moves.logical_not().unsqueeze(1);
    const at::Tensor order =
        at::where(stays, at::arange(n, sorting.options()).unsqueeze(0), sorting);
    const at::Tensor turn =
        at::where(stays.unsqueeze(2), at::eye(n, Q.options()).unsqueeze(0), Q);  // Pi^T P
    const at::Tensor P = turn.scatter(1, order.unsqueeze(2).expand({-1, n, n}), turn);
    const at::Tensor upper =
        at::bmm(at::bmm(turn.transpose(1, 2), permuted(F, order)), turn).triu();
    const at::Tensor symmetric = upper.add(upper.triu(1).transpose(1, 2));
    const at::Tensor new_F = at::where(stays.unsqueeze(2), F, symmetric);
    const at::Tensor new_Q = at::bmm(at::stack(bases), P);
    const at::Tensor growth =
        at::where(stays, at::ones_like(old_diagonal),
                  cpu::growth(group_.options, old_diagonal, new_F.diagonal(0, 1, 2)));

    for (size_t i = 0; i < problems_.size(); ++i) {
      const auto b = static_cast<int64_t>(i);
      factors[i].copy_(new_F[b]);
      bases[i].copy_(corrected(*problems_[i], new_Q[b]));
      move_momentum(*problems_[i], P[b]);
      move_second_moment(*problems_[i], order[b], growth[b]);
    }
  }

 private:
  // Pi^T F Pi.
  static at::Tensor permuted(const at::Tensor& F, const at::Tensor& order) {
    return F.gather(2, order.unsqueeze(1).expand_as(F)).gather(1, order.unsqueeze(2).expand_as(F));
  }

  int64_t size_of(const Problem<float>& p) const { return left_ ? p.m : p.n; }

  // In a step that is skipped nothing moves, and nothing fails.
  at::Tensor unless_skipped(const at::Tensor& flags) const {
    return group_.skip ? flags.logical_and(group_.skip->eq(0)) : flags;
  }

  void count_refreshes(const at::Tensor& failed) const {
    for (size_t i = 0; i < problems_.size(); ++i) {
      const auto options = at::TensorOptions().dtype(at::kLong).device(group_.device);
      at::from_blob(problems_[i]->refresh_fallbacks, {1}, options)
          .add_(failed[static_cast<int64_t>(i)]);
      problems_[i]->refreshes[static_cast<size_t>(side_)] += 1;
    }
  }

  at::Tensor corrected(const Problem<float>& p, const at::Tensor& Q) const {
    const bool is_due = p.refreshes[static_cast<size_t>(side_)] % cpu::kRefreshesPerCorrection == 0;
    return is_due ? cpu::orthonormalized(Q) : Q;
  }

  void move_momentum(const Problem<float>& p, const at::Tensor& P) const {
    at::Tensor exp_avg = device_view(p.exp_avg, {p.m, p.n}, group_.device);
    exp_avg.copy_(left_ ? P.t().mm(exp_avg) : exp_avg.mm(P));
  }

  void move_second_moment(const Problem<float>& p, const at::Tensor& order,
                          const at::Tensor& growth) const {
    if (p.exp_avg_sq != nullptr) {
      const std::array<int64_t, 2> shape =
          p.is_skinny() ? std::array{p.short_side(), p.skinny_rank + 1} : std::array{p.m, p.n};
      const bool by_rows = left_ || p.is_skinny();
      at::Tensor v = device_view(p.exp_avg_sq, shape, group_.device);
      v.copy_(v.index_select(by_rows ? 0 : 1, order).mul_(growth.unsqueeze(by_rows ? 1 : 0)));
      return;
    }
    at::Tensor vector =
        device_view(left_ ? p.exp_avg_sq_row : p.exp_avg_sq_col, {size_of(p)}, group_.device);
    const at::Tensor old = vector.index_select(0, order).to(at::kDouble);
    const at::Tensor moved = old.mul(growth);
    if (group_.options.second_moment == SecondMoment::kRankOne) {
      const auto options = at::TensorOptions().dtype(at::kDouble).device(group_.device);
      const at::Tensor norm = moved.norm();
      const at::Tensor divisor = at::where(norm.gt(0), norm, at::ones_like(norm));
      at::from_blob(p.exp_avg_sq_scale, {1}, options).mul_(divisor.sqrt());
      vector.copy_(moved.div(divisor));
      return;
    }
    // Both means move alike, for the mean of the row vector divides row_i col_j.
    const at::Tensor total = old.sum();
    const at::Tensor ratio = at::where(total.gt(0), moved.sum().div(total), at::ones_like(total));
    vector.copy_(moved);
    device_view(left_ ? p.exp_avg_sq_col : p.exp_avg_sq_row, {left_ ? p.n : p.m}, group_.device)
        .mul_(ratio.to(at::kFloat));
  }

  const DeviceGroup& group_;
  bool left_;
  Side side_;
  std::vector<const Problem<float>*> problems_;
};

}  // namespace

void refresh_basis_on_device_(const DeviceGroup& group, Side side) {
  const c10::DeviceGuard guard(group.device);
  // Rounding here would turn the bases away from orthogonality for good.
  const auto backend =
      group.device.is_cuda() ? at::Float32Backend::CUDA : at::Float32Backend::MKLDNN;
  const cpu::MatmulPrecision precision("highest", backend);
  std::map<int64_t, std::vector<const Problem<float>*>> by_size;
  for (const Problem<float>& p : group.problems) {
    const bool left = side == Side::kLeft;
    if ((left ? p.L : p.R) == nullptr) {
      // Also in a step that is skipped: the host counts the rows of the basis.
      if (p.is_skinny()) cpu::refresh_long_(cpu::SkinnyMatrix(p, group.device), group.options);
      continue;
    }
    const int64_t n = left ? p.m : p.n;
    auto& batch = by_size[n];
    batch.push_back(&p);
    if (static_cast<int64_t>(batch.size()) * n * n >= kMaxBatchEntries) {
      RefreshBatch(group, side, std::move(batch)).run();
      by_size.erase(n);
    }
  }
  for (const auto& [n, batch] : by_size) RefreshBatch(group, side, batch).run();
}

}  // namespace dykaf::bindings

#endif
