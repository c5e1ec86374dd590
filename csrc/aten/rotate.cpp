#include "aten/batch_ops.h"
#include "aten/products.h"

namespace dykaf::aten {

at::Tensor rotated(const Batch& batch, const at::Tensor& X, Rotation rotation,
                   MatmulPrecision precision) {
  const bool into = rotation == Rotation::kIntoBasis;
  at::Tensor result = X;
  if (batch.first().Q_L.defined()) {
    const at::Tensor Q_L = batch.get(&Matrix::Q_L);
    result = product(into ? Q_L.mT() : Q_L, result, precision);
  }
  if (batch.first().Q_R.defined()) {
    const at::Tensor Q_R = batch.get(&Matrix::Q_R);
    result = product(result, into ? Q_R : Q_R.mT(), precision);
  }
  return result;
}

}  // namespace dykaf::aten
