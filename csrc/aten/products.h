// Matrix products whose operands are rounded as asked, whatever torch's settings.
#pragma once

#include "aten/torch.h"
#include "dykaf/types.h"

namespace dykaf::aten {

// Of a product's operands, by torch's setting for products on the CPU.
MatmulPrecision torch_precision();

// Whether this CPU multiplies bfloat16 itself.
bool multiplies_bfloat16();

// out = a b of matrices on the CPU, in full precision; allocates nothing where torch has a BLAS
// that can be called.
void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

// a b in full precision, of matrices or batches of them on any device.
at::Tensor full_product(const at::Tensor& a, const at::Tensor& b);

// a b of batches with operands rounded to no less than `precision`; kHigh on a device by torch's
// own setting.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, MatmulPrecision precision);

}  // namespace dykaf::aten
