// Which lane runs next, the switch to it, and the end of a block that did something wrong.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "context_switch.h"
#include "state.h"

namespace simt {

SIMT_UNCHECKED inline uint64_t next_random(Worker& worker) {
  uint64_t state = worker.random_state;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  worker.random_state = state;
  return state;
}

inline bool is_shuffled(const Worker& worker) { return worker.seed >= 2; }

// Lane to lane, without a trip through a scheduler. threadIdx is set before the switch: a fiber
// whose next block runs on another host thread must not write through an address it kept.
SIMT_UNCHECKED inline void switch_to(Worker& worker, Fiber* target) {
  Fiber* self = worker.current;
  if (self == target) {
    return;
  }
  worker.current = target;
  threadIdx = target->thread_idx;
  ++worker.stats.switches;
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&self->asan_fake_stack, target->stack, target->stack_bytes);
#endif
#if SIMT_TSAN
  __tsan_switch_to_fiber(target->tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  simt_switch(&self->stack_pointer, target->stack_pointer);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(self->asan_fake_stack, nullptr, nullptr);
#endif
}

SIMT_UNCHECKED inline void make_ready(Worker& worker, int warp_idx, uint32_t lanes) {
  worker.ready_lanes[warp_idx] |= lanes;
  worker.ready_warps |= 1u << warp_idx;
}

SIMT_UNCHECKED inline void make_waiting(Worker& worker, const Fiber& fiber) {
  uint32_t& lanes = worker.ready_lanes[fiber.warp_idx];
  lanes &= ~(1u << fiber.lane_idx);
  if (lanes == 0) {
    worker.ready_warps &= ~(1u << fiber.warp_idx);
  }
}

SIMT_UNCHECKED inline void shuffle_warps(Worker& worker) {
  for (int i = worker.num_warps - 1; i > 0; --i) {
    const int j = static_cast<int>(next_random(worker) % (i + 1));
    const uint8_t moved = worker.warp_order[i];
    worker.warp_order[i] = worker.warp_order[j];
    worker.warp_order[j] = moved;
  }
}

SIMT_UNCHECKED inline int lowest_bit(uint32_t bits) { return std::countr_zero(bits); }
SIMT_UNCHECKED inline int highest_bit(uint32_t bits) { return 31 - std::countl_zero(bits); }

// Most picks follow the list, so that its first warp runs as far ahead of the others as it can:
// few random decisions reach the orders that a race needs. Some picks are uniform.
SIMT_UNCHECKED inline int pick_warp(const Worker& worker, uint64_t random) {
  uint32_t warps = worker.ready_warps;
  if (random % 16 == 0) {
    for (int skip = static_cast<int>((random >> 8) % std::popcount(warps)); skip > 0; --skip) {
      warps &= warps - 1;
    }
    return lowest_bit(warps);
  }
  for (int i = 0; i < worker.num_warps; ++i) {
    if (warps >> worker.warp_order[i] & 1) {
      return worker.warp_order[i];
    }
  }
  return lowest_bit(warps);
}

// Ascending or descending from a random lane.
SIMT_UNCHECKED inline int pick_lane(uint32_t lanes, uint64_t random) {
  const int first = static_cast<int>((random >> 40) % kWarpSize);
  const uint32_t rotated = std::rotr(lanes, first);
  const bool ascending = random >> 50 & 1;
  return ((ascending ? lowest_bit(rotated) : highest_bit(rotated)) + first) % kWarpSize;
}

SIMT_UNCHECKED inline Fiber* pick_fiber(Worker& worker) {
  if (worker.ready_warps == 0) {
    return nullptr;
  }
  int warp_idx;
  int lane_idx;
  if (worker.seed == 0) {
    warp_idx = lowest_bit(worker.ready_warps);
    lane_idx = lowest_bit(worker.ready_lanes[warp_idx]);
  } else if (worker.seed == 1) {
    warp_idx = highest_bit(worker.ready_warps);
    lane_idx = highest_bit(worker.ready_lanes[warp_idx]);
  } else {
    const uint64_t random = next_random(worker);
    warp_idx = pick_warp(worker, random);
    lane_idx = pick_lane(worker.ready_lanes[warp_idx], random);
  }
  return &worker.fibers[warp_idx * kWarpSize + lane_idx];
}

inline std::string describe(const Fiber& fiber) {
  const uint3& thread = fiber.thread_idx;
  char text[400];
  snprintf(text, sizeof text,
           "\n    block (%u,%u,%u) thread (%u,%u,%u) [warp %d lane %d] %s at %s:%u", blockIdx.x,
           blockIdx.y, blockIdx.z, thread.x, thread.y, thread.z, fiber.warp_idx, fiber.lane_idx,
           fiber.operation ? fiber.operation : "", fiber.where.file_name(), fiber.where.line());
  return text;
}

// What the lanes did so far happened before whatever the host does next. TSan is told in the name
// of each of them, since they will not run again.
SIMT_UNCHECKED inline void release_all_lanes([[maybe_unused]] Worker& worker) {
#if SIMT_TSAN
  for (int i = 0; i < worker.num_threads; ++i) {
    __tsan_switch_to_fiber(worker.fibers[i].tsan_fiber, __tsan_switch_to_fiber_no_sync);
    __tsan_release(&worker.end_sync);
  }
  __tsan_switch_to_fiber(worker.current->tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
}

// Leaves the block for good. No frame of a fiber may own memory here: nothing is unwound.
[[noreturn]] SIMT_UNCHECKED inline void abandon_block(Worker& worker) {
  worker.abandoned = true;
  release_all_lanes(worker);
  switch_to(worker, &worker.host);
  abort();
}

// Not inlined: its temporaries must be gone before the block is abandoned.
__attribute__((noinline)) inline void record_error(Worker& worker, const char* what,
                                                   const Fiber* first, const Fiber* second) {
  if (!worker.error.empty()) {
    return;
  }
  worker.error = what;
  for (const Fiber* fiber : {first, second}) {
    if (fiber != nullptr) {
      worker.error += describe(*fiber);
    }
  }
}

[[noreturn]] SIMT_UNCHECKED inline void fail(const char* what, const Fiber* first = nullptr,
                                             const Fiber* second = nullptr) {
  if (g_worker == nullptr) {
    throw std::runtime_error(std::string("simt: ") + what + " (outside of a kernel)");
  }
  record_error(*g_worker, what, first, second);
  abandon_block(*g_worker);
}

__attribute__((noinline)) inline void record_deadlock(Worker& worker) {
  constexpr int kMaxDescribed = 4;
  worker.error = "deadlock (divergent barrier or collective); waiting:";
  int num_described = 0;
  for (int i = 0; i < worker.num_threads && num_described < kMaxDescribed; ++i) {
    if (!worker.fibers[i].done) {
      worker.error += describe(worker.fibers[i]);
      ++num_described;
    }
  }
}

SIMT_UNCHECKED inline void run_next(Worker& worker) {
  Fiber* next = pick_fiber(worker);
  if (next == nullptr) {
    record_deadlock(worker);
    abandon_block(worker);
  }
  switch_to(worker, next);
}

SIMT_UNCHECKED inline bool same_place(Location a, Location b) {
  // The same pointer inside: the common case, without a look at what it points to.
  static_assert(sizeof(Location) == sizeof(const void*));
  if (std::bit_cast<const void*>(a) == std::bit_cast<const void*>(b)) {
    return true;
  }
  return a.line() == b.line() && a.column() == b.column() &&
         strcmp(a.file_name(), b.file_name()) == 0;
}

// The lane that calls, with the operation noted for messages. Null outside of a kernel.
SIMT_UNCHECKED inline Fiber* enter_operation(const char* operation, Location where) {
  if (g_worker == nullptr) {
    return nullptr;
  }
  Fiber* fiber = g_worker->current;
  fiber->operation = operation;
  fiber->where = where;
  return fiber;
}

}  // namespace simt
