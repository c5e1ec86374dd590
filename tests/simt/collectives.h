// Where lanes meet: the barrier of a block and the collectives of a warp.
#pragma once

#include <cstdint>

#include "banks.h"
#include "schedule.h"

namespace simt {

SIMT_UNCHECKED inline void release_barrier(Worker& worker) {
  const Fiber& first = worker.fibers[0];
  for (int i = 0; i < worker.num_threads; ++i) {
    Fiber& fiber = worker.fibers[i];
    if (!same_place(first.where, fiber.where)) {
      fail("lanes meet at different __syncthreads():", &first, &fiber);
    }
    fiber.at_barrier = false;
  }
  for (int warp_idx = 0; warp_idx < worker.num_warps; ++warp_idx) {
    make_ready(worker, warp_idx, kFullMask);
    if (worker.check_banks) {
      check_banks_of_warp(worker, &worker.fibers[warp_idx * kWarpSize]);
    }
  }
  worker.num_at_barrier = 0;
  ++worker.barrier_phase;
  ++worker.stats.barriers;
  if (is_shuffled(worker) && next_random(worker) % 2 == 0) {
    shuffle_warps(worker);
  }
}

SIMT_UNCHECKED inline void sync_block(Location where = Location::current()) {
  Worker& worker = *g_worker;
  Fiber* self = enter_operation("__syncthreads", where);
  // The device would let the others pass. Here every lane must reach every barrier, so that the
  // kernels do not depend on it, and so that a lane that left by mistake is noticed.
  if (worker.num_live != worker.num_threads) {
    fail("barrier after a lane has exited:", self);
  }
  self->at_barrier = true;
  char* sync = &worker.barrier_sync[worker.barrier_phase % 2];
  tsan_release(sync);
  make_waiting(worker, *self);
  ++worker.num_at_barrier;
  if (worker.num_at_barrier == worker.num_threads) {
    release_barrier(worker);
  }
  run_next(worker);
  tsan_acquire(sync);
}

// __syncwarp orders the memory accesses of its lanes. Shuffles, votes and mma do not: without this
// difference TSan would not see a race that only a shuffle separates.
enum class MemoryOrder { kNone, kSequenced };

// What the last lane to arrive does for all: it reads the operands of the lanes of `mask` through
// warp[lane].operands, on their stacks, and writes the results there.
using Finish = void (*)(Worker& worker, Fiber* warp, uint32_t mask);

SIMT_UNCHECKED inline WarpMeeting& find_meeting(Worker& worker, const Fiber& self, uint32_t mask) {
  WarpMeeting* found = nullptr;
  for (WarpMeeting& meeting : worker.meetings[self.warp_idx]) {
    if (meeting.arrived == 0) {
      found = found == nullptr ? &meeting : found;
    } else if (meeting.mask == mask) {
      return meeting;
    } else if ((meeting.mask & mask) != 0) {
      fail("overlapping masks in one warp:", &self,
           &worker.fibers[self.warp_idx * kWarpSize + lowest_bit(meeting.arrived)]);
    }
  }
  if (found == nullptr) {
    fail("too many collectives under way in one warp:", &self);
  }
  return *found;
}

SIMT_UNCHECKED inline void check_same_operation(const Fiber& self, const Fiber* warp,
                                                uint32_t mask) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Fiber& other = warp[lane];
    if ((mask >> lane & 1) && &other != &self &&
        (other.operation != self.operation || !same_place(other.where, self.where))) {
      fail("divergent warp collective:", &self, &other);
    }
  }
}

// One wait for each lane and collective: whoever arrives last finishes the work of the whole warp.
// `operation` must be the same pointer in all lanes.
SIMT_UNCHECKED inline void meet(const char* operation, uint32_t mask, void* operands, Finish finish,
                                MemoryOrder order, Location where) {
  Worker& worker = *g_worker;
  Fiber* self = enter_operation(operation, where);
  self->operands = operands;
  const uint32_t lane_bit = 1u << self->lane_idx;
  if ((mask & lane_bit) == 0) {
    fail("calling lane is not in the mask:", self);
  }
  WarpMeeting& meeting = find_meeting(worker, *self, mask);
  meeting.mask = mask;
  meeting.arrived |= lane_bit;
  char* sync = &meeting.sync[meeting.phase % 2];
  if (order == MemoryOrder::kSequenced) {
    tsan_release(sync);
  }
  if (meeting.arrived != mask) {
    make_waiting(worker, *self);
    run_next(worker);
  } else {
    Fiber* warp = &worker.fibers[self->warp_idx * kWarpSize];
    check_same_operation(*self, warp, mask);
    if (finish != nullptr) {
      finish(worker, warp, mask);
    }
    if (worker.check_banks && mask == kFullMask) {
      check_banks_of_warp(worker, warp);
    }
    meeting.arrived = 0;
    ++meeting.phase;
    ++worker.stats.collectives;
    make_ready(worker, self->warp_idx, mask);
    if (is_shuffled(worker)) {
      run_next(worker);
    }
  }
  if (order == MemoryOrder::kSequenced) {
    tsan_acquire(sync);
  }
}

template <typename Operands>
Operands& operands_of(const Fiber& fiber) {
  return *static_cast<Operands*>(fiber.operands);
}

}  // namespace simt
