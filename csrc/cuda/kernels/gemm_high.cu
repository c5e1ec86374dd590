// The multiplications at matmul precision "high"; one file per precision, so that they compile side
// by side.
#include "cuda/kernels/gemm.cuh"

namespace dykaf::cuda {

int launch_gemm_high(GemmForm form, TileClass tile_class, const Grouped<GemmProblem>& launch,
                     const Group& group, Stream stream) {
  return launch_gemm_precision<MatmulPrecision::kHigh>(form, tile_class, launch, group, stream);
}

}  // namespace dykaf::cuda
