// The sanitizers' fiber interfaces as plain functions that do nothing in a build without them.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define SIMT_ASAN 0
#endif

#if defined(__SANITIZE_THREAD__)
#define SIMT_TSAN 1
#include <sanitizer/tsan_interface.h>
// The executor's own bookkeeping is shared by fibers without synchronisation TSan could see, so it
// is left out of the instrumentation. Not inlined, or it would be instrumented with its caller.
#define SIMT_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
#else
#define SIMT_TSAN 0
#define SIMT_UNCHECKED
#endif

namespace simt {

SIMT_UNCHECKED inline void tsan_release([[maybe_unused]] void* sync_object) {
#if SIMT_TSAN
  __tsan_release(sync_object);
#endif
}

SIMT_UNCHECKED inline void tsan_acquire([[maybe_unused]] void* sync_object) {
#if SIMT_TSAN
  __tsan_acquire(sync_object);
#endif
}

inline void asan_poison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#if SIMT_ASAN
  __asan_poison_memory_region(begin, bytes);
#endif
}

inline void asan_unpoison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#if SIMT_ASAN
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

}  // namespace simt
