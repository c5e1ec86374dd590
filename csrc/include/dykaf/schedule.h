// When the basis of a side is refreshed next.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dykaf/types.h"

namespace dykaf {

// Steps until the next refresh after step t: the period, or with the geometric schedule a tenth of
// the steps done, at least 1 and at most the period (bases move fast at the start).
inline int64_t refresh_interval(int64_t t, const Options& options) {
  const int64_t period = options.precondition_frequency;
  if (options.refresh_schedule == RefreshSchedule::kFixed) return period;
  return std::min(period, std::max<int64_t>(1, t / 10));
}

// The step at which a side is due after step t. Staggered, it is the last step of the interval that
// is congruent to `offset`, so sides with different offsets take turns and none waits longer.
inline int64_t next_refresh(int64_t t, const Options& options, int64_t offset) {
  const int64_t interval = refresh_interval(t, options);
  const int64_t latest = t + interval;
  if (!options.refresh_stagger) return latest;
  const int64_t excess = (latest - offset) % interval;
  return latest - (excess < 0 ? excess + interval : excess);
}

}  // namespace dykaf
