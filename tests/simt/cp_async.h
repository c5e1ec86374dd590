// Asynchronous copies to shared memory. Nothing lands before the lane that issued a copy waits for
// its group; until then the destination is NaN, and 16-byte destinations are poisoned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "schedule.h"

namespace simt {

using AliasedWord [[gnu::may_alias]] = uint32_t;

SIMT_UNCHECKED inline Fiber* check_copy(const void* dst, const void* src, int bytes,
                                        int valid_bytes, Location where) {
  Fiber* fiber = enter_operation("cp.async", where);
  if (fiber == nullptr) {
    fail("cp.async");
  }
  ++g_worker->stats.cp_async;
  if (reinterpret_cast<uintptr_t>(dst) % bytes != 0) {
    fail("cp.async: misaligned shared address:", fiber);
  }
  if (valid_bytes < 0 || valid_bytes > bytes) {
    fail("cp.async: bad source size:", fiber);
  }
  if (valid_bytes > 0 && reinterpret_cast<uintptr_t>(src) % bytes != 0) {
    fail("cp.async: misaligned global address:", fiber);
  }
  return fiber;
}

// AddressSanitizer poisons whole multiples of 8 bytes.
inline bool can_poison(int bytes) { return bytes >= 8; }

inline void issue_copy(void* dst, const void* src, int bytes, int valid_bytes, Location where) {
  Fiber* fiber = check_copy(dst, src, bytes, valid_bytes, where);
  auto* dst_bytes = static_cast<char*>(dst);
  const auto* src_bytes = static_cast<const char*>(src);
  for (int i = 0; i < bytes; i += 4) {
    *reinterpret_cast<volatile AliasedWord*>(dst_bytes + i) = 0xFFFFFFFFu;
  }
  // Read now as well, so that a source out of range is reported at the line that issues the copy.
  int num_read = 0;
  for (; num_read + 4 <= valid_bytes; num_read += 4) {
    (void)*reinterpret_cast<const volatile AliasedWord*>(src_bytes + num_read);
  }
  for (; num_read < valid_bytes; ++num_read) {
    (void)*reinterpret_cast<const volatile char*>(src_bytes + num_read);
  }
  if (can_poison(bytes)) {
    asan_poison(dst, bytes);
  }
  fiber->copies.push_back({dst_bytes, src_bytes, bytes, valid_bytes, fiber->copy_group});
}

inline void commit_copies() { ++g_worker->current->copy_group; }

// Lands all committed groups but the newest `num_pending`.
inline void wait_for_copies(unsigned num_pending) {
  Fiber* fiber = g_worker->current;
  while (fiber->num_landed < fiber->copies.size()) {
    const AsyncCopy& copy = fiber->copies[fiber->num_landed];
    if (copy.group + num_pending >= fiber->copy_group) {
      break;
    }
    if (can_poison(copy.bytes)) {
      asan_unpoison(copy.dst, copy.bytes);
    }
    memset(copy.dst, 0, copy.bytes);
    memcpy(copy.dst, copy.src, copy.valid_bytes);
    ++fiber->num_landed;
  }
  if (fiber->num_landed == fiber->copies.size()) {
    fiber->copies.clear();
    fiber->num_landed = 0;
  }
}

}  // namespace simt

namespace dykaf::cuda {

// The first `bytes` (0 to 16) bytes come from src, the rest of the 16 is zero.
inline void cp_async16(void* dst, const void* src, int bytes,
                       simt::Location where = simt::Location::current()) {
  simt::issue_copy(dst, src, 16, bytes, where);
}

// 16 bytes from src, or zeros without a look at src.
inline void cp_async16_or_zeros(void* dst, const void* src, bool copies,
                                simt::Location where = simt::Location::current()) {
  simt::issue_copy(dst, src, 16, copies ? 16 : 0, where);
}

inline void cp_async4(void* dst, const void* src, int bytes,
                      simt::Location where = simt::Location::current()) {
  simt::issue_copy(dst, src, 4, bytes, where);
}

inline void cp_async_commit() { simt::commit_copies(); }

template <int N>
void cp_async_wait() {
  simt::wait_for_copies(N);
}

}  // namespace dykaf::cuda
