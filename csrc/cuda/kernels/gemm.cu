// The grid of a grouped multiplication, and the choice of the kernel's precision.
#include "cuda/kernels/gemm.h"
#include "cuda/kernels/gemm_tile.cuh"

namespace dykaf::cuda {
namespace {

template <class Tile>
int64_t tiles_of(GemmForm form, int64_t m, int64_t n) {
  const int64_t tiles_m = ceil_div(m, Tile::kM);
  return is_symmetric(form) ? tiles_m * (tiles_m + 1) / 2 : tiles_m * ceil_div(n, Tile::kN);
}

}  // namespace

int64_t num_tiles(TileClass tile_class, GemmForm form, int64_t m, int64_t n) {
  switch (tile_class) {
    case TileClass::kLarge:
      return tiles_of<LargeTile>(form, m, n);
    case TileClass::kMedium:
      return tiles_of<MediumTile>(form, m, n);
    case TileClass::kWide:
      return tiles_of<WideTile>(form, m, n);
    case TileClass::kTall:
      return tiles_of<TallTile>(form, m, n);
  }
  return 0;
}

int launch_gemm(MatmulPrecision precision, GemmForm form, TileClass tile_class,
                const GemmLaunch& launch, Stream stream) {
  switch (precision) {
    case MatmulPrecision::kHighest:
      return launch_gemm_highest(form, tile_class, launch, stream);
    case MatmulPrecision::kHigh:
      return launch_gemm_high(form, tile_class, launch, stream);
    case MatmulPrecision::kMedium:
      return launch_gemm_medium(form, tile_class, launch, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace dykaf::cuda
