// How the matrices of a list share the threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu/aten.h"
#include "cpu/mkl_threads.h"
#include "dykaf/types.h"

namespace dykaf::cpu {

// Up to here a second thread gains more from a second matrix than within BLAS and LAPACK.
inline constexpr int64_t kMaxSharedSide = 1024;

template <typename T>
bool is_small(const Problem<T>& p) {
  if (p.is_unsided()) return p.size() <= kMaxSharedSide * kMaxSharedSide;
  if (p.is_skinny()) return true;
  return std::max(p.m, p.n) <= kMaxSharedSide;
}

// Relative time of a step; as a double, for it only orders and balances.
template <typename T>
double weight(const Problem<T>& p) {
  const auto m = static_cast<double>(p.m);
  const auto n = static_cast<double>(p.n);
  if (p.is_skinny()) return m * n * static_cast<double>(4 * p.skinny_rank);
  return m * n * (m + n) + (p.L != nullptr ? m * m * m : 0) + (p.R != nullptr ? n * n * n : 0);
}

// Makes `context` of a type `make_context(std::span<const Problem<T>>)`, once per thread, and calls
// body(i, context) for each matrix: small ones side by side, each on one thread, largest first, if
// there are enough of them for all threads; then the others in turn, with all threads for each.
template <typename T, typename MakeContext, typename Body>
void for_each_matrix(std::span<const Problem<T>> problems, const MakeContext& make_context,
                     const Body& body) {
  std::vector<size_t> shared;
  std::vector<size_t> in_turn;
  double total = 0;
  double largest = 0;
  for (size_t i = 0; i < problems.size(); ++i) {
    if (!is_small(problems[i])) {
      in_turn.push_back(i);
      continue;
    }
    shared.push_back(i);
    total += weight(problems[i]);
    largest = std::max(largest, weight(problems[i]));
  }
  const int num_threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (num_threads == 1 || total < num_threads * largest) {
    in_turn.insert(in_turn.begin(), shared.begin(), shared.end());
    shared.clear();
  }
  const auto chosen = [&](const std::vector<size_t>& indices) {
    std::vector<Problem<T>> list;
    for (size_t i : indices) list.push_back(problems[i]);
    return list;
  };

  if (!shared.empty()) {
    std::stable_sort(shared.begin(), shared.end(),
                     [&](size_t a, size_t b) { return weight(problems[a]) > weight(problems[b]); });
    const std::vector<Problem<T>> list = chosen(shared);
    std::atomic<size_t> next = 0;
    at::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
      const at::AutoDispatchBelowADInplaceOrView no_autograd;  // does not carry over to threads
      const OneMklThread one_thread;
      auto context = make_context(std::span<const Problem<T>>(list));
      for (size_t k = next++; k < shared.size(); k = next++) body(shared[k], context);
    });
  }
  if (in_turn.empty()) return;
  const std::vector<Problem<T>> list = chosen(in_turn);
  auto context = make_context(std::span<const Problem<T>>(list));
  for (size_t i : in_turn) body(i, context);
}

// For bodies that need nothing beside the matrix: body(i).
template <typename T, typename Body>
void for_each_matrix(std::span<const Problem<T>> problems, const Body& body) {
  for_each_matrix(
      problems, [](auto) { return nullptr; }, [&](size_t i, std::nullptr_t) { body(i); });
}

}  // namespace dykaf::cpu
