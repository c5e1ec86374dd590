// Arithmetic without denormal numbers, which takes many times as long with them.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace dykaf::aten {

// Denormal numbers count as zeros on this thread while it lives. Householder's QR makes them of
// dependent columns: each is what rounding has left of the one before, 1e-8 of it in float32, and
// arithmetic with denormals takes many times as long.
class NoDenormals {
 public:
#if defined(__SSE2__)
  NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZero); }
  ~NoDenormals() { _mm_setcsr(before_); }
#else
  NoDenormals() = default;
#endif
  NoDenormals(const NoDenormals&) = delete;
  NoDenormals& operator=(const NoDenormals&) = delete;

 private:
#if defined(__SSE2__)
  static constexpr unsigned kFlushToZero = 0x8000;
  static constexpr unsigned kDenormalsAreZero = 0x0040;
  const unsigned before_;
#endif
};

}  // namespace dykaf::aten
