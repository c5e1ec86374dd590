// The multiplications at matmul precision "medium"; one file per precision, so that they compile
// side by side.
#include "cuda/kernels/gemm.cuh"

namespace dykaf::cuda {

int launch_gemm_medium(GemmForm form, TileClass tile_class, const GemmLaunch& launch,
                       Stream stream) {
  return launch_gemm_precision<MatmulPrecision::kMedium>(form, tile_class, launch, stream);
}

}  // namespace dykaf::cuda
