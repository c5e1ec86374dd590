// The grouped matrix multiplications of a step: D = op(A) op(B) with an epilogue, for many matrices
// at once.
#pragma once

#include <cstdint>

#include "cuda/kernels/matrices.h"

namespace dykaf::cuda {

// What becomes of a computed entry.
enum class Epilogue : int32_t {
  kStore,      // D
  kAdam,       // D, and one Adam step whose update goes to `update`; partials: update^2
  kParameter,  // the parameter's update in its dtype
  kSums,       // D; partials: C^2, C D, D^2, of a null C zero but for the last
  kInner,      // nothing; partials: C D
  // Of a Newton-Schulz step (dykaf/newton_schulz.h), P the product and t^2 the bound:
  kQuadratic,    // D = b C / t^2 + c P / t^4, C symmetric
  kQuintic,      // D = (a C + P) / t
  kLastQuintic,  // the same times the update's scale; partials: D^2
};

inline constexpr bool is_newton_schulz(Epilogue epilogue) {
  return epilogue == Epilogue::kQuadratic || epilogue == Epilogue::kQuintic ||
         epilogue == Epilogue::kLastQuintic;
}

// Block shapes, by output: 128 x 128, 64 x 64, 16 x 64 (few rows), 64 x 16 (few columns).
enum class TileClass : int32_t { kLarge, kMedium, kWide, kTall };
inline constexpr int kNumTileClasses = 4;

inline constexpr int kNumSums = 3;

// All matrices are row-major and contiguous.
struct GemmProblem {
  const float* A;        // [m, k]; [k, m] where the form transposes it
  const float* B;        // [k, n]; [n, k] where the form transposes it
  const float* C;        // [m, n]; kSums, kInner and those of Newton-Schulz
  float* D;              // [m, n]
  union {                // one pointer, for the kernel keeps all fields in registers
    float* update;       // [m, n]; kAdam
    const float* bound;  // [1], t^2 of Newton-Schulz, 0 standing for 1; null: 1
  };
  double* partials;  // [num_tiles, kNumSums]; kAdam, kSums, kInner and kLastQuintic
  int32_t m;
  int32_t n;
  int32_t k;
  int32_t matrix_idx;  // into the arrays of matrices and scalars
  int32_t tile_begin;
  Epilogue epilogue;
};

// Blocks of a launch that one multiplication takes.
int64_t num_tiles(TileClass tile_class, GemmForm form, int64_t m, int64_t n);

// What a launch reads on the device.
struct GemmLaunch {
  const GemmProblem* problems;  // [num]
  const MatrixOnDevice* matrices;
  const MatrixScalars* scalars;  // null: all matrices are active, and no epilogue needs more
  int32_t num;
  int64_t grid;
  const AdamOptions* adam;  // kAdam and kLastQuintic
};

// Launches one grid; returns a cudaError_t.
int launch_gemm(MatmulPrecision precision, GemmForm form, TileClass tile_class,
                const GemmLaunch& launch, Stream stream);
int launch_gemm_highest(GemmForm form, TileClass tile_class, const GemmLaunch& launch,
                        Stream stream);
int launch_gemm_high(GemmForm form, TileClass tile_class, const GemmLaunch& launch, Stream stream);
int launch_gemm_medium(GemmForm form, TileClass tile_class, const GemmLaunch& launch,
                       Stream stream);

}  // namespace dykaf::cuda
