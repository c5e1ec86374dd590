// How the matrices of a list share the threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "cpu/matrix.h"
#include "cpu/mkl_threads.h"
#include "dykaf/types.h"

namespace dykaf::cpu {

// Up to here a second thread gains more from a second matrix than within BLAS and LAPACK.
inline constexpr int64_t kMaxSharedSide = 1024;
// In multiply-adds. Less is done before other threads have woken, and long before on a busy
// machine: such a list stays on one thread, and such a matrix too.
inline constexpr double kMinSharedWork = 1 << 23;

template <typename T>
bool is_small(const Problem<T>& p) {
  if (p.is_adamw()) return p.size() <= kMaxSharedSide * kMaxSharedSide;
  if (p.is_skinny()) return true;
  return std::max(p.m, p.n) <= kMaxSharedSide;
}

// Relative time of a step; as a double, for it only orders and balances.
template <typename T>
double weight(const Problem<T>& p) {
  const auto m = static_cast<double>(p.m);
  const auto n = static_cast<double>(p.n);
  if (p.is_adamw()) return m * n;
  if (p.is_skinny()) return m * n * static_cast<double>(4 * p.skinny_rank);
  return m * n * (m + n) + (p.L != nullptr ? m * m * m : 0) + (p.R != nullptr ? n * n * n : 0);
}

// Whether BLAS and LAPACK take one thread for a matrix: its own sizes decide, and nothing that is
// in the list beside it. So it comes out as the same bits in any company, and on any rank.
template <typename T>
bool has_one_thread(const Problem<T>& p) {
  return is_small(p) || weight(p) < kMinSharedWork;
}

// Which matrices go side by side, each on one thread, largest first: small ones, if there are
// enough of them for all threads. The others follow in turn, with all threads for each.
template <typename T>
struct Sharing {
  explicit Sharing(std::span<const Problem<T>> problems)
      : num_threads(at::in_parallel_region() ? 1 : at::get_num_threads()) {
    double total = 0;
    double largest = 0;
    for (size_t i = 0; i < problems.size(); ++i) {
      if (!is_small(problems[i])) {
        in_turn.push_back(i);
        continue;
      }
      side_by_side.push_back(i);
      total += weight(problems[i]);
      largest = std::max(largest, weight(problems[i]));
    }
    if (num_threads == 1 || total < num_threads * largest || total < kMinSharedWork) {
      in_turn.insert(in_turn.begin(), side_by_side.begin(), side_by_side.end());
      side_by_side.clear();
    }
    std::stable_sort(side_by_side.begin(), side_by_side.end(),
                     [&](size_t a, size_t b) { return weight(problems[a]) > weight(problems[b]); });
  }

  int num_threads;
  std::vector<size_t> side_by_side;
  std::vector<size_t> in_turn;
};

// Scratch memory for each thread that works on `problems`, allocated at once.
template <typename T>
class Workspaces {
 public:
  explicit Workspaces(std::span<const Problem<T>> problems) : sharing(problems) {
    const auto add = [&](const std::vector<size_t>& indices, int count) {
      std::vector<Problem<T>> list;
      for (size_t i : indices) list.push_back(problems[i]);
      for (int k = 0; k < count && !list.empty(); ++k) workspaces_.emplace_back(list);
    };
    add(sharing.in_turn, 1);
    num_in_turn_ = workspaces_.size();
    add(sharing.side_by_side, sharing.num_threads);
  }

  const Sharing<T> sharing;

  const Workspace<T>& in_turn() const { return workspaces_[0]; }
  const Workspace<T>& side_by_side(int64_t thread) const {
    return workspaces_[num_in_turn_ + static_cast<size_t>(thread)];
  }

 private:
  std::vector<Workspace<T>> workspaces_;
  size_t num_in_turn_ = 0;
};

// For bodies that need none.
template <typename T>
struct NoWorkspaces {
  explicit NoWorkspaces(std::span<const Problem<T>> problems) : sharing(problems) {}

  const Sharing<T> sharing;

  std::nullptr_t in_turn() const { return nullptr; }
  std::nullptr_t side_by_side(int64_t) const { return nullptr; }
};

// Calls body(i, workspace) for each matrix; `workspaces` are those of the same problems.
template <typename T, typename Memory, typename Body>
void for_each_matrix(std::span<const Problem<T>> problems, const Memory& workspaces,
                     const Body& body) {
  const std::vector<size_t>& shared = workspaces.sharing.side_by_side;
  if (!shared.empty()) {
    std::atomic<size_t> next = 0;
    at::parallel_for(0, workspaces.sharing.num_threads, 1, [&](int64_t thread, int64_t) {
      const at::AutoDispatchBelowADInplaceOrView no_autograd;  // does not carry over to threads
      const OneMklThread one_thread;
      for (size_t k = next++; k < shared.size(); k = next++) {
        body(shared[k], workspaces.side_by_side(thread));
      }
    });
  }
  for (size_t i : workspaces.sharing.in_turn) {
    std::optional<OneMklThread> one_thread;
    if (has_one_thread(problems[i])) one_thread.emplace();
    if (problems[i].is_skinny()) {
      // Within a region torch's own sums take one thread too.
      at::parallel_for(0, 1, 1, [&](int64_t, int64_t) { body(i, workspaces.in_turn()); });
    } else {
      body(i, workspaces.in_turn());
    }
  }
}

template <typename T, typename Body>
void for_each_matrix(std::span<const Problem<T>> problems, const Body& body) {
  for_each_matrix(problems, NoWorkspaces<T>(problems), [&](size_t i, std::nullptr_t) { body(i); });
}

}  // namespace dykaf::cpu
