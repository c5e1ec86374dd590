// Decompositions, judged by whether what must be orthonormal is.
#pragma once

#include <optional>

#include "aten/torch.h"

namespace dykaf::aten {

// a, or its copy on the CPU where its device has no decompositions (MPS).
at::Tensor decomposable(const at::Tensor& a);

struct QR {
  at::Tensor Q;  // [..., n, n], or [..., n, k] for a tall reduced input
  at::Tensor R;  // upper triangular, diagonal >= 0
};

// Householder QR of one matrix or a batch, on any device, signs fixed so that R's diagonal is not
// negative.
QR signed_qr(const at::Tensor& a);

// Whether the columns of each Q [..., n, k] are orthonormal, as a tensor of bools that no host has
// waited for: ||Q^T Q x - x||_max for x of alternating signs, without a matrix product, so that
// whatever rounds those is seen too. NaN and infinity are not orthonormal.
at::Tensor is_orthonormal(const at::Tensor& Q);
// The same of the columns where `seen` [..., k] is 1, not 0, in which case they must be zero.
at::Tensor is_orthonormal(const at::Tensor& Q, const at::Tensor& seen);

// signed_qr of a batch and its verdict; on the CPU tried again in float64 where Q is not
// orthonormal.
struct JudgedQR {
  at::Tensor Q;
  at::Tensor R;
  at::Tensor sound;  // bool [...]; where false, Q and R are of no use
};
JudgedQR judged_qr(const at::Tensor& a);

// signed_qr of one matrix, tried again in float64 if Q is not orthonormal; nothing if that fails.
std::optional<QR> checked_qr(const at::Tensor& a);

struct Eigen {
  at::Tensor values;   // [b, n], descending
  at::Tensor vectors;  // [b, n, n], columns
  at::Tensor sound;    // bool [b]; where false the others are of no use
};

// Of a batch of symmetric matrices [b, n, n], those whose vectors are not orthonormal tried again
// in float64. Waits for the device.
Eigen settled_eigenvectors(const at::Tensor& a);

// judged_qr of a batch, those that are not orthonormal tried again in float64 on any device. Waits
// for it.
JudgedQR settled_qr(const at::Tensor& a);

}  // namespace dykaf::aten
