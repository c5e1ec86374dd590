// The multiplications at matmul precision "high"; one file per precision, so that they compile side
// by side.
#include "cuda/kernels/gemm.cuh"

namespace dykaf::cuda {

int launch_gemm_high(GemmForm form, TileClass tile_class, const GemmLaunch& launch, Stream stream) {
  return launch_gemm_precision<MatmulPrecision::kHigh>(form, tile_class, launch, stream);
}

}  // namespace dykaf::cuda
