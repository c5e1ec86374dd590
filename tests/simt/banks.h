// Bank conflicts of logged shared-memory loads. The loads of a warp's lanes are put together again
// where the warp is converged, and counted as the warp-wide instructions they come from.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace simt {

inline constexpr int kNumBanks = 32;
inline constexpr uint32_t kBankBytes = 4;

SIMT_UNCHECKED inline void log_shared_load(const char* operation, const void* address, int bytes,
                                           Location where) {
  if (g_worker == nullptr || !g_worker->check_banks) {
    return;
  }
  Fiber* fiber = enter_operation(operation, where);
  if (fiber->num_shared_loads == kMaxLoggedLoads) {
    fail("no room to log more shared loads between two collectives or barriers", fiber);
  }
  fiber->shared_loads[fiber->num_shared_loads++] = {
      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address)), static_cast<uint32_t>(bytes),
      where.line(), where.column()};
}

// Lanes of one request that must wait for another one: in each bank, every distinct word but the
// first takes another turn; the request takes as long as its busiest bank.
SIMT_UNCHECKED inline int count_conflicts(const uint32_t* words, int num_words) {
  int num_in_bank[kNumBanks] = {};
  int busiest = 1;
  for (int i = 0; i < num_words; ++i) {
    bool is_repeated = false;
    for (int k = 0; k < i && !is_repeated; ++k) {
      is_repeated = words[k] == words[i];
    }
    if (!is_repeated) {
      int& count = num_in_bank[words[i] % kNumBanks];
      ++count;
      busiest = count > busiest ? count : busiest;
    }
  }
  return busiest - 1;
}

// One instruction: the next logged load of each lane in `lanes`. A request serves 32 words, so
// 8-byte loads are served by half-warps.
SIMT_UNCHECKED inline void count_instruction(Worker& worker, const Fiber* warp, const int* next,
                                             uint32_t lanes, uint32_t bytes) {
  const int words_per_lane = static_cast<int>(bytes / kBankBytes);
  const int lanes_per_request = kWarpSize / words_per_lane;
  ++worker.stats.shared_loads;
  for (int first = 0; first < kWarpSize; first += lanes_per_request) {
    uint32_t words[kNumBanks];
    int num_words = 0;
    for (int lane = first; lane < first + lanes_per_request; ++lane) {
      if (lanes >> lane & 1) {
        const uint32_t word = warp[lane].shared_loads[next[lane]].address / kBankBytes;
        for (int k = 0; k < words_per_lane; ++k) {
          words[num_words++] = word + k;
        }
      }
    }
    worker.stats.shared_load_conflicts += count_conflicts(words, num_words);
  }
}

// Lanes that took different branches have different lists: of the lanes with loads left, those at
// the same place in the source as the first of them execute together.
SIMT_UNCHECKED inline void check_banks_of_warp(Worker& worker, Fiber* warp) {
  int next[kWarpSize] = {};
  for (;;) {
    const SharedLoad* leader = nullptr;
    uint32_t lanes = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (next[lane] == warp[lane].num_shared_loads) {
        continue;
      }
      const SharedLoad& load = warp[lane].shared_loads[next[lane]];
      if (leader == nullptr) {
        leader = &load;
      }
      if (load.line == leader->line && load.column == leader->column &&
          load.bytes == leader->bytes) {
        lanes |= 1u << lane;
      }
    }
    if (leader == nullptr) {
      break;
    }
    count_instruction(worker, warp, next, lanes, leader->bytes);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      next[lane] += lanes >> lane & 1;
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    warp[lane].num_shared_loads = 0;
  }
}

}  // namespace simt
