// When the basis of a side is refreshed next. Matrix is a Problem of types.h, or has its fields of
// these names.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <vector>

#include "dykaf/types.h"

namespace dykaf {

// Steps until the next refresh after step t: the period, or with the geometric schedule a tenth of
// the steps done, at least 1 and at most the period (bases move fast at the start).
inline int64_t refresh_interval(int64_t t, const Options& options) {
  const int64_t period = options.precondition_frequency;
  if (options.refresh_schedule == RefreshSchedule::kFixed) return period;
  return std::min(period, std::max<int64_t>(1, t / 10));
}

// The step at which a side is due after step t. With the geometric schedule it is the last step of
// the interval that is congruent to `offset`, so sides with different offsets take turns and none
// waits longer; with the fixed one all sides have the same steps.
inline int64_t next_refresh(int64_t t, const Options& options, int64_t offset) {
  const int64_t interval = refresh_interval(t, options);
  const int64_t latest = t + interval;
  if (options.refresh_schedule == RefreshSchedule::kFixed) return latest;
  const int64_t excess = (latest - offset) % interval;
  return latest - (excess < 0 ? excess + interval : excess);
}

// Dates are at least 1 once the first gradient has set factors and bases, and 0 before. On a device
// the host does not wait to see more gradients of a matrix that has seen zeros alone: its dates are
// kSawZero, and -1 when the last one was not zero (python/dykaf/work.py).
inline constexpr int64_t kSawZero = -2;

template <typename Matrix>
bool awaits_first_gradient(const Matrix& p) {
  return !p.is_unsided() && p.next_refresh[0] <= 0 && p.next_refresh[1] <= 0;
}

// The matrices of a step on a device by what it does with them, as places in their list.
struct StepPlaces {
  template <typename List>
  explicit StepPlaces(const List& matrices) {
    for (size_t i = 0; i < matrices.size(); ++i) {
      const auto& p = matrices[i];
      const bool is_fresh = awaits_first_gradient(p);
      (!is_fresh ? running : p.next_refresh[0] == kSawZero ? waiting : fresh).push_back(i);
    }
  }

  // Those that have seen zeros alone when the first gradients are done.
  template <typename List>
  std::vector<size_t> still_waiting(const List& matrices) const {
    std::vector<size_t> places = waiting;
    std::copy_if(fresh.begin(), fresh.end(), std::back_inserter(places),
                 [&](size_t i) { return matrices[i].next_refresh[0] == kSawZero; });
    return places;
  }

  std::vector<size_t> fresh;    // get their first gradient
  std::vector<size_t> running;  // have had it
  std::vector<size_t> waiting;  // are left out
};

template <typename List>
std::vector<typename List::value_type> chosen(const List& matrices,
                                              const std::vector<size_t>& places) {
  std::vector<typename List::value_type> result;
  for (size_t i : places) result.push_back(matrices[i]);
  return result;
}

// Counts a step of each matrix that has factors. Returns, per Side, the places of those whose basis
// is due now, among them skinny matrices that have no room for another gradient; their dates move
// on.
template <typename Matrix>
std::array<std::vector<size_t>, 2> take_due(std::span<const Matrix> matrices,
                                            const Options& options) {
  std::array<std::vector<size_t>, 2> due;
  for (size_t place = 0; place < matrices.size(); ++place) {
    const Matrix& p = matrices[place];
    if (p.is_unsided() || awaits_first_gradient(p)) continue;
    const int64_t t = *p.schedule_step += 1;
    for (const Side side : {Side::kLeft, Side::kRight}) {
      const auto i = static_cast<size_t>(side);
      const bool is_long = (side == Side::kRight) == p.is_wide();
      const bool is_due = t >= p.next_refresh[i] || (is_long && p.is_full());
      if (!p.has_factor(side) || !is_due) continue;
      due[i].push_back(place);
      p.next_refresh[i] = next_refresh(t, options, p.refresh_offset[i]);
    }
  }
  return due;
}

}  // namespace dykaf
