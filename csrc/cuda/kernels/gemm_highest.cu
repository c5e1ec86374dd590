// The multiplications at matmul precision "highest"; one file per precision, so that they compile
// side by side.
#include "cuda/kernels/gemm.cuh"

namespace dykaf::cuda {

int launch_gemm_highest(GemmForm form, TileClass tile_class, const GemmLaunch& launch,
                        Stream stream) {
  return launch_gemm_precision<MatmulPrecision::kHighest>(form, tile_class, launch, stream);
}

}  // namespace dykaf::cuda
