// Shared memory with guards. It is filled with NaN before each block. Under AddressSanitizer
// what lies between two arrays is poisoned, so an index out of range is reported where it happens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "schedule.h"

namespace simt {

// Largest shared memory of a block (static and dynamic) on sm_90, and its part without opt-in.
inline constexpr size_t kMaxSharedBytes = 227 * 1024;
inline constexpr size_t kMaxStaticBytes = 48 * 1024;
inline constexpr size_t kSharedAlignment = 16;
// All banks once: a guard moves no address to another bank.
inline constexpr size_t kGuardBytes = 128;
inline constexpr size_t kDynamicGuardBytes = kMaxPieces * kGuardBytes;
inline constexpr size_t kStaticCapacity = kMaxStaticBytes + kMaxStaticVariables * 2 * kGuardBytes;

SIMT_UNCHECKED inline size_t round_up(size_t bytes, size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

// A variable is known by the address of `key`, a static constant beside its declaration.
SIMT_UNCHECKED inline void* static_shared(const void* key, size_t bytes) {
  Worker& worker = *g_worker;
  for (int i = 0; i < worker.num_variables; ++i) {
    if (worker.variables[i].key == key) {
      return worker.variables[i].address;
    }
  }
  worker.static_bytes += round_up(bytes, kSharedAlignment);
  if (worker.num_variables == kMaxStaticVariables || worker.static_bytes > kMaxStaticBytes) {
    fail("static shared memory exhausted");
  }
  if (worker.static_bytes + worker.dynamic_bytes > kMaxSharedBytes) {
    fail("static and dynamic shared memory together exceed the limit of a block");
  }
  char* address = worker.static_shared + worker.static_used;
  worker.static_used += round_up(bytes, kGuardBytes) + kGuardBytes;
  asan_unpoison(address, bytes);
  worker.variables[worker.num_variables++] = {key, address};
  return address;
}

SIMT_UNCHECKED inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(g_worker->dynamic_shared);
}

// Called by each lane that begins to carve again; the first one starts the new round.
SIMT_UNCHECKED inline void begin_carve(const unsigned char* base, bool is_reuse) {
  Worker& worker = *g_worker;
  Fiber& self = *worker.current;
  self.operation = "SharedCarver";
  if (base != dynamic_shared()) {
    fail("SharedCarver must start at the base of dynamic shared memory", &self);
  }
  self.carve_round += is_reuse;
  if (self.carve_round > worker.carve_round) {
    worker.carve_round = self.carve_round;
    worker.num_old_pieces = worker.num_pieces;
    worker.num_pieces = 0;
  }
}

__attribute__((noinline)) inline void record_undersized(Worker& worker, size_t needed) {
  worker.error = "dynamic shared memory: carved " + std::to_string(needed) + " bytes of " +
                 std::to_string(worker.dynamic_bytes);
}

// Volatile, because memset would be seen by TSan and raced by the lanes that carved already.
SIMT_UNCHECKED inline void fill_with_nan(char* address, size_t bytes) {
  volatile char* target = address;
  for (size_t i = 0; i < bytes; ++i) {
    target[i] = static_cast<char>(0xFF);
  }
}

// Piece number `piece_idx` of the running round. All lanes must carve alike: the first one lays the
// piece out, the others are compared with it. From the first piece on that differs from the round
// before, contents do not survive: the guards move, and what was there is NaN again.
SIMT_UNCHECKED inline void* carve(int piece_idx, size_t offset, size_t bytes) {
  Worker& worker = *g_worker;
  Fiber& self = *worker.current;
  self.operation = "SharedCarver::take";
  if (offset + bytes > worker.dynamic_bytes) {
    record_undersized(worker, offset + bytes);
    abandon_block(worker);
  }
  if (piece_idx == kMaxPieces) {
    fail("dynamic shared memory: too many pieces", &self);
  }
  const SharedPiece piece{offset, bytes};
  char* address = worker.dynamic_shared + offset + piece_idx * kGuardBytes;
  SharedPiece& known = worker.pieces[piece_idx];
  if (piece_idx < worker.num_pieces) {
    if (!(known == piece)) {
      fail("lanes carve dynamic shared memory differently", &self);
    }
    return address;
  }
  if (piece_idx == 0) {
    asan_poison(worker.dynamic_shared, worker.dynamic_capacity);
  }
  asan_unpoison(address, bytes);
  if (piece_idx >= worker.num_old_pieces || !(known == piece)) {
    worker.num_old_pieces = 0;
    if (worker.carve_round > 0) {
      fill_with_nan(address, bytes);
    }
  }
  known = piece;
  ++worker.num_pieces;
  return address;
}

// Before a block starts. 0xFF in every byte is a NaN in float, double and bfloat16.
inline void reset_shared_memory(Worker& worker) {
  asan_unpoison(worker.dynamic_shared, worker.dynamic_capacity);
  asan_unpoison(worker.static_shared, kStaticCapacity);
  memset(worker.dynamic_shared, 0xFF, worker.dynamic_capacity);
  memset(worker.static_shared, 0xFF, worker.static_used);
  // Until it is carved, dynamic memory can be used through its base.
  asan_poison(worker.dynamic_shared + worker.dynamic_bytes,
              worker.dynamic_capacity - worker.dynamic_bytes);
  asan_poison(worker.static_shared, kStaticCapacity);
  worker.static_used = 0;
  worker.static_bytes = 0;
  worker.num_variables = 0;
  worker.num_pieces = 0;
  worker.num_old_pieces = 0;
  worker.carve_round = 0;
}

}  // namespace simt

namespace dykaf::cuda {

struct ReuseTag {};
inline constexpr ReuseTag kReuse{};

class SharedCarver {
 public:
  explicit SharedCarver(unsigned char* base) { simt::begin_carve(base, /*is_reuse=*/false); }

  // The same memory once more, after a barrier.
  SharedCarver(unsigned char* base, ReuseTag) { simt::begin_carve(base, /*is_reuse=*/true); }

  template <class T>
  T* take(int count) {
    static_assert(alignof(T) <= simt::kSharedAlignment);
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    void* address = simt::carve(num_pieces_, offset_, bytes);
    offset_ += simt::round_up(bytes, simt::kSharedAlignment);
    ++num_pieces_;
    return static_cast<T*>(address);
  }

 private:
  size_t offset_ = 0;
  int num_pieces_ = 0;
};

}  // namespace dykaf::cuda
