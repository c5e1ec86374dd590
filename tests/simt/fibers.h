// The life of a fiber: its stack, its endless loop over blocks, and its exit from a kernel.
#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "schedule.h"

namespace simt {

inline constexpr size_t kPageBytes = 4096;
inline constexpr size_t kStackBytes = (SIMT_ASAN || SIMT_TSAN) ? 256 * 1024 : 64 * 1024;
// The guard page also keeps the distance of two stacks from being a power of two, which would put
// the same frame of all lanes in the same cache set.
inline constexpr size_t kStackStride = kStackBytes + kPageBytes;

SIMT_UNCHECKED inline void exit_lane(Worker& worker, Fiber& self) {
  self.operation = "exit";
  self.where = Location{};
  if (self.num_landed != self.copies.size()) {
    fail("kernel exit with cp.async in flight:", &self);
  }
  self.done = true;
  make_waiting(worker, self);
  tsan_release(&worker.end_sync);
  --worker.num_live;
  if (worker.num_at_barrier > 0) {
    const Fiber* waiting = worker.fibers;
    while (!waiting->at_barrier) {
      ++waiting;
    }
    fail("lane exited while others wait at a barrier:", &self, waiting);
  }
  if (worker.num_live == 0) {
    switch_to(worker, &worker.host);
  } else {
    run_next(worker);
  }
}

// Each turn of the loop is one block: fibers are used again, not built anew.
SIMT_UNCHECKED inline void fiber_main() {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Worker& worker = *g_worker;
  Fiber& self = *worker.current;
  for (;;) {
    tsan_acquire(&worker.start_sync);
    worker.kernel(worker.arguments);
    exit_lane(worker, self);
  }
}

SIMT_UNCHECKED inline void init_fiber(Fiber& fiber, int fiber_idx, char* stack) {
  fiber.warp_idx = fiber_idx / kWarpSize;
  fiber.lane_idx = fiber_idx % kWarpSize;
  fiber.stack = stack;
  fiber.stack_bytes = kStackBytes;
  asan_unpoison(stack, kStackBytes);
  // Stack tops are spread over the cache sets.
  const size_t offset = static_cast<size_t>(fiber_idx) * 320 % kPageBytes;
  fiber.stack_pointer = first_frame(stack + kStackBytes - 64 - offset, fiber_main);
#if SIMT_TSAN
  fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
}

inline void free_fibers(Worker& worker) {
#if SIMT_TSAN
  for (int i = 0; i < worker.num_fibers; ++i) {
    __tsan_destroy_fiber(worker.fibers[i].tsan_fiber);
  }
#endif
  if (worker.stacks != nullptr) {
    munmap(worker.stacks, worker.stacks_bytes);
  }
  delete[] worker.fibers;
}

inline void build_fibers(Worker& worker, int num_fibers) {
  free_fibers(worker);
  worker.fibers = new Fiber[num_fibers];
  worker.num_fibers = num_fibers;
  worker.stacks_bytes = num_fibers * kStackStride;
  void* stacks = mmap(nullptr, worker.stacks_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) {
    worker.stacks = nullptr;
    throw std::runtime_error("simt: no memory for the stacks of a block");
  }
  worker.stacks = static_cast<char*>(stacks);
  for (int i = 0; i < num_fibers; ++i) {
    char* guard = worker.stacks + i * kStackStride;
    mprotect(guard, kPageBytes, PROT_NONE);
    init_fiber(worker.fibers[i], i, guard + kPageBytes);
  }
  worker.abandoned = false;
}

// AddressSanitizer wants the bounds of the host's stack for the switch back to it.
inline void find_host_stack([[maybe_unused]] Fiber& host) {
#if SIMT_ASAN
  // Slow to ask for: once for each host thread.
  static thread_local void* address = nullptr;
  static thread_local size_t bytes = 0;
  if (address == nullptr) {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &address, &bytes);
    pthread_attr_destroy(&attributes);
  }
  host.stack = static_cast<char*>(address);
  host.stack_bytes = bytes;
#endif
#if SIMT_TSAN
  host.tsan_fiber = __tsan_get_current_fiber();
#endif
}

}  // namespace simt
