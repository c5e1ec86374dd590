// Launches: the blocks of a grid, on the host threads of the options, in the order of the seed.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fibers.h"
#include "runtime_api.h"
#include "shared_memory.h"

namespace simt {

struct Grid {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  void (*kernel)(void*);
  void* arguments;

  uint64_t num_blocks() const { return uint64_t{grid.x} * grid.y * grid.z; }
  uint64_t num_threads() const { return uint64_t{block.x} * block.y * block.z; }
};

inline void check_grid(const Grid& grid) {
  constexpr unsigned kMaxGridX = 0x7FFFFFFF;
  constexpr unsigned kMaxGridYZ = 65535;
  if (grid.num_blocks() == 0 || grid.grid.x > kMaxGridX || grid.grid.y > kMaxGridYZ ||
      grid.grid.z > kMaxGridYZ) {
    throw std::runtime_error("simt: bad grid");
  }
  if (grid.num_threads() == 0 || grid.num_threads() > kMaxThreads ||
      grid.num_threads() % kWarpSize != 0) {
    throw std::runtime_error("simt: block size must be a multiple of 32, at most 1024");
  }
  if (grid.shared_bytes > kMaxSharedBytes) {
    throw std::runtime_error("simt: dynamic shared memory over the limit of a block");
  }
  if (g_worker != nullptr) {
    throw std::runtime_error("simt: launch from a kernel");
  }
}

// Order of the blocks: for shuffled seeds i -> start + i * step modulo their number.
class BlockOrder {
 public:
  BlockOrder(uint64_t seed, uint64_t num_blocks) : seed_(seed), num_blocks_(num_blocks) {
    if (seed >= 2) {
      start_ = seed * 40503u % num_blocks;
      step_ = seed * 2654435761u % num_blocks;
    }
    while (std::gcd(step_, num_blocks) != 1) {
      ++step_;
    }
  }

  uint64_t operator[](uint64_t i) const {
    return seed_ == 1 ? num_blocks_ - 1 - i : (i * step_ + start_) % num_blocks_;
  }

 private:
  uint64_t seed_;
  uint64_t num_blocks_;
  uint64_t start_ = 0;
  uint64_t step_ = 1;
};

inline void prepare_worker(Worker& worker, const Grid& grid) {
  const int num_threads = static_cast<int>(grid.num_threads());
  if (worker.num_fibers < num_threads || worker.abandoned) {
    build_fibers(worker, std::max(num_threads, worker.num_fibers));
  }
  worker.num_threads = num_threads;
  worker.num_warps = num_threads / kWarpSize;
  worker.kernel = grid.kernel;
  worker.arguments = grid.arguments;
  worker.seed = options().seed;
  worker.check_banks = options().check_banks;
  worker.round_toward_zero = options().round_toward_zero;
  worker.stats = Stats{};
  worker.error.clear();
  if (worker.check_banks) {
    worker.load_logs.resize(static_cast<size_t>(num_threads) * kMaxLoggedLoads);
  }
  for (int i = 0; i < num_threads; ++i) {
    Fiber& fiber = worker.fibers[i];
    const unsigned row = i / grid.block.x;
    fiber.thread_idx = {i % grid.block.x, row % grid.block.y, row / grid.block.y};
    fiber.shared_loads = worker.check_banks ? &worker.load_logs[i * kMaxLoggedLoads] : nullptr;
  }
  // Allocated anew with the exact size: what lies behind it belongs to AddressSanitizer.
  free(worker.dynamic_shared);
  worker.dynamic_bytes = grid.shared_bytes;
  worker.dynamic_capacity = grid.shared_bytes + kDynamicGuardBytes;
  worker.dynamic_shared = static_cast<char*>(
      aligned_alloc(kGuardBytes, round_up(worker.dynamic_capacity, kGuardBytes)));
  if (worker.static_shared == nullptr) {
    worker.static_shared = static_cast<char*>(aligned_alloc(kGuardBytes, kStaticCapacity));
    worker.static_used = kStaticCapacity;
  }
  find_host_stack(worker.host);
}

SIMT_UNCHECKED inline void seed_random(Worker& worker, uint64_t block_idx) {
  constexpr int kWarmUp = 8;
  worker.random_state = worker.seed * 0x9E3779B97F4A7C15u;
  worker.random_state ^= (block_idx + 1) * 0xD1B54A32D192ED03u;
  worker.random_state ^= 0x2545F4914F6CDD1Du;
  if (worker.random_state == 0) {
    worker.random_state = 1;
  }
  for (int i = 0; i < kWarmUp; ++i) {
    next_random(worker);
  }
}

SIMT_UNCHECKED inline void reset_lanes(Worker& worker) {
  worker.num_at_barrier = 0;
  worker.num_live = worker.num_threads;
  worker.ready_warps = 0;
  for (int i = 0; i < worker.num_warps; ++i) {
    worker.ready_lanes[i] = 0;
    worker.warp_order[i] = static_cast<uint8_t>(i);
    for (WarpMeeting& meeting : worker.meetings[i]) {
      meeting.arrived = 0;
    }
    make_ready(worker, i, kFullMask);
  }
  for (int i = 0; i < worker.num_threads; ++i) {
    Fiber& fiber = worker.fibers[i];
    fiber.done = false;
    fiber.at_barrier = false;
    fiber.operation = nullptr;
    fiber.where = Location{};
    fiber.num_shared_loads = 0;
    fiber.copies.clear();
    fiber.num_landed = 0;
    fiber.copy_group = 0;
    fiber.carve_round = 0;
  }
}

SIMT_UNCHECKED inline void run_block(Worker& worker, uint64_t block_idx) {
  seed_random(worker, block_idx);
  reset_shared_memory(worker);
  reset_lanes(worker);
  shuffle_warps(worker);
  worker.current = &worker.host;
  tsan_release(&worker.start_sync);
  switch_to(worker, pick_fiber(worker));
  tsan_acquire(&worker.end_sync);
}

// Workers wait here between launches, with their fibers.
class WorkerPool {
 public:
  Worker* take() {
    const std::lock_guard lock(mutex_);
    if (idle_.empty()) {
      return new Worker;
    }
    Worker* worker = idle_.back();
    idle_.pop_back();
    return worker;
  }

  void give_back(Worker* worker) {
    const std::lock_guard lock(mutex_);
    idle_.push_back(worker);
  }

  static WorkerPool& instance() {
    static auto* pool = new WorkerPool;
    return *pool;
  }

 private:
  std::mutex mutex_;
  std::vector<Worker*> idle_;
};

// What the host threads of a launch share.
struct Progress {
  std::atomic<uint64_t> num_started{0};
  std::atomic<bool> has_failed{false};
  std::mutex mutex;
  std::string error;
  Stats stats;
};

inline void run_blocks(const Grid& grid, const BlockOrder& order, Progress& progress) {
  Worker& worker = *WorkerPool::instance().take();
  prepare_worker(worker, grid);
  g_worker = &worker;
  blockDim = {grid.block.x, grid.block.y, grid.block.z};
  gridDim = {grid.grid.x, grid.grid.y, grid.grid.z};
  while (!progress.has_failed && worker.error.empty()) {
    const uint64_t i = progress.num_started++;
    if (i >= grid.num_blocks()) {
      break;
    }
    const uint64_t block_idx = order[i];
    const uint64_t row = block_idx / grid.grid.x;
    blockIdx = {static_cast<unsigned>(block_idx % grid.grid.x),
                static_cast<unsigned>(row % grid.grid.y), static_cast<unsigned>(row / grid.grid.y)};
    run_block(worker, block_idx);
  }
  g_worker = nullptr;
  {
    const std::lock_guard lock(progress.mutex);
    progress.stats += worker.stats;
    if (!worker.error.empty() && !progress.has_failed) {
      progress.error = worker.error;
      progress.has_failed = true;
    }
  }
  WorkerPool::instance().give_back(&worker);
}

inline void run_grid(const char* name, const Grid& grid) {
  check_grid(grid);
  if (options().stubbed) return;
  const BlockOrder order(options().seed, grid.num_blocks());
  Progress progress;
  uint64_t num_workers = options().workers;
  if (num_workers == 0) {
    num_workers = std::thread::hardware_concurrency();
  }
  num_workers = std::min(num_workers, grid.num_blocks());
  {
    std::vector<std::jthread> helpers;
    for (uint64_t i = 1; i < num_workers; ++i) {
      helpers.emplace_back([&] { run_blocks(grid, order, progress); });
    }
    run_blocks(grid, order, progress);
  }

  static std::mutex totals_mutex;
  {
    const std::lock_guard lock(totals_mutex);
    stats() += progress.stats;
    ++stats().launches;
    launch_log().push_back({name, grid.grid, grid.block, grid.shared_bytes});
  }
  if (progress.has_failed) {
    throw std::runtime_error("simt: " + progress.error);
  }
}

// Limit of CUDA for the parameters of one kernel.
inline constexpr size_t kMaxParameterBytes = 32764;

template <typename... Params, typename... Args>
cudaError_t launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                   size_t shared_bytes, cudaStream_t, Args&&... args) {
  using Parameters = std::tuple<std::remove_cv_t<Params>...>;
  static_assert(sizeof(Parameters) <= kMaxParameterBytes);
  struct Call {
    void (*kernel)(Params...);
    Parameters parameters;
  };
  Call call{kernel, Parameters(std::forward<Args>(args)...)};
  const auto run = [](void* opaque) {
    auto* self = static_cast<Call*>(opaque);
    std::apply(self->kernel, self->parameters);
  };
  run_grid(name, Grid{grid, block, shared_bytes, run, &call});
  return cudaSuccess;
}

}  // namespace simt
