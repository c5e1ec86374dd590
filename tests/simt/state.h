// What the executor knows: options and totals for the tests, and the state of a running block.
// One Worker runs one block at a time; each CUDA thread of the block (a lane of a warp) is a Fiber.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <source_location>
#include <string>
#include <vector>

#include "sanitizers.h"
#include "vector_types.h"

// initial-exec: one load without a call, also where the kernels are in a shared library.
#define SIMT_THREAD_LOCAL inline __thread __attribute__((tls_model("initial-exec")))

SIMT_THREAD_LOCAL uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

using Location = std::source_location;

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxThreads = 1024;
inline constexpr int kMaxWarps = kMaxThreads / kWarpSize;
inline constexpr uint32_t kFullMask = 0xFFFFFFFFu;

struct Options {
  // Order of the lanes and blocks: 0 ascending, 1 descending, from 2 on shuffled by the seed.
  uint64_t seed = 0;
  // Host threads that run blocks; 0 is one for each processor.
  int workers = 0;
  // Tensor cores add with truncation instead of rounding to nearest.
  bool round_toward_zero = false;
  // Grids are checked, but do not run: what is left is the host's work.
  bool stubbed = std::getenv("SIMT_STUBBED") != nullptr;
  // Log the addresses of load_shared and load_shared2 and count their bank conflicts.
  bool check_banks = false;
};

struct Stats {
  uint64_t launches = 0;
  uint64_t switches = 0;
  uint64_t collectives = 0;
  uint64_t barriers = 0;
  uint64_t mma = 0;
  uint64_t ldmatrix = 0;
  uint64_t ldmatrix_conflicts = 0;
  uint64_t shared_loads = 0;  // warp-wide loads; counted only with Options::check_banks
  uint64_t shared_load_conflicts = 0;
  uint64_t cp_async = 0;

  Stats& operator+=(const Stats& other) {
    launches += other.launches;
    switches += other.switches;
    collectives += other.collectives;
    barriers += other.barriers;
    mma += other.mma;
    ldmatrix += other.ldmatrix;
    ldmatrix_conflicts += other.ldmatrix_conflicts;
    shared_loads += other.shared_loads;
    shared_load_conflicts += other.shared_load_conflicts;
    cp_async += other.cp_async;
    return *this;
  }
};

struct LaunchRecord {
  std::string kernel;  // as written in DYKAF_LAUNCH
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
};

inline Options& options() {
  static Options instance;
  return instance;
}

// Totals over all launches since the last reset().
inline Stats& stats() {
  static Stats instance;
  return instance;
}

inline std::vector<LaunchRecord>& launch_log() {
  static std::vector<LaunchRecord> instance;
  return instance;
}

inline void reset() {
  stats() = Stats{};
  launch_log().clear();
}

struct AsyncCopy {
  char* dst;
  const char* src;
  int bytes;
  int valid_bytes;  // the rest is zero
  unsigned group;
};

struct SharedLoad {
  uint32_t address;
  uint32_t bytes;
  unsigned line;
  unsigned column;
};

// Of one lane, from one point where its warp is converged to the next.
inline constexpr int kMaxLoggedLoads = 1024;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;

  uint3 thread_idx{};
  int warp_idx = 0;
  int lane_idx = 0;

  bool done = false;
  bool at_barrier = false;
  // The operation the lane waits in or called last, its operands and where the kernel calls it.
  const char* operation = nullptr;
  void* operands = nullptr;
  Location where{};

  SharedLoad* shared_loads = nullptr;  // [kMaxLoggedLoads], only with Options::check_banks
  int num_shared_loads = 0;
  std::vector<AsyncCopy> copies;  // in flight from num_landed on
  size_t num_landed = 0;
  unsigned copy_group = 0;
  int carve_round = 0;  // how many times the lane began to carve dynamic shared memory again
};

// Lanes of a warp that meet under one mask. Consecutive meetings use the two sync objects in turn:
// a lane may arrive at the next one before another has left this one.
struct WarpMeeting {
  uint32_t mask = 0;
  uint32_t arrived = 0;
  unsigned phase = 0;
  char sync[2] = {};
};

// Disjoint masks can be under way in one warp at the same time.
inline constexpr int kMaxMeetings = 4;

struct StaticVariable {
  const void* key;
  char* address;
};

struct SharedPiece {
  size_t offset = 0;
  size_t bytes = 0;
  bool operator==(const SharedPiece&) const = default;
};

inline constexpr int kMaxStaticVariables = 32;
inline constexpr int kMaxPieces = 32;

struct Worker {
  // Fibers: the lanes of the block, and the host stack that runs them.
  Fiber* fibers = nullptr;
  int num_fibers = 0;
  Fiber host;
  Fiber* current = nullptr;
  char* stacks = nullptr;
  size_t stacks_bytes = 0;

  // The block: its lanes, and what they run.
  int num_threads = 0;
  int num_warps = 0;
  int num_live = 0;
  void (*kernel)(void*) = nullptr;
  void* arguments = nullptr;
  std::string error;
  bool abandoned = false;  // fibers stopped in the middle of a kernel: build them again

  // Synchronisation.
  int num_at_barrier = 0;
  unsigned barrier_phase = 0;
  char barrier_sync[2] = {};
  char start_sync = 0;
  char end_sync = 0;
  WarpMeeting meetings[kMaxWarps][kMaxMeetings];

  // Schedule: bit sets of lanes (and of warps with such lanes) that can run.
  uint32_t ready_lanes[kMaxWarps] = {};
  uint32_t ready_warps = 0;
  uint8_t warp_order[kMaxWarps] = {};
  uint64_t random_state = 1;
  uint64_t seed = 0;

  // Shared memory.
  char* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  size_t dynamic_capacity = 0;  // dynamic_bytes and the guards
  SharedPiece pieces[kMaxPieces];
  int num_pieces = 0;
  int num_old_pieces = 0;
  int carve_round = 0;
  char* static_shared = nullptr;
  size_t static_used = 0;   // with guards
  size_t static_bytes = 0;  // as the device counts them
  StaticVariable variables[kMaxStaticVariables];
  int num_variables = 0;

  bool check_banks = false;
  bool round_toward_zero = false;
  std::vector<SharedLoad> load_logs;  // of all fibers
  Stats stats;
};

SIMT_THREAD_LOCAL Worker* g_worker = nullptr;

}  // namespace simt
