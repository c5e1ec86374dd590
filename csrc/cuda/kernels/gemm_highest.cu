// The multiplications at matmul precision "highest"; one file per precision, so that they compile
// side by side.
#include "cuda/kernels/gemm.cuh"

namespace dykaf::cuda {

int launch_gemm_highest(GemmForm form, TileClass tile_class, const Grouped<GemmProblem>& launch,
                        const Group& group, Stream stream) {
  return launch_gemm_precision<MatmulPrecision::kHighest>(form, tile_class, launch, group, stream);
}

}  // namespace dykaf::cuda
