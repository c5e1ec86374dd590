#include "aten/decompositions.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "aten/matrix.h"
#include "aten/no_denormals.h"
#include "aten/products.h"

namespace dykaf::aten {

at::Tensor decomposable(const at::Tensor& a) { return a.is_mps() ? a.to(at::kCPU) : a; }

QR signed_qr(const at::Tensor& a) {
  const NoDenormals no_denormals;
  auto [Q, R] = at::linalg_qr(decomposable(a));
  const at::Tensor diagonal = R.diagonal(0, -2, -1);
  const at::Tensor signs =
      at::where(diagonal.lt(0), -at::ones_like(diagonal), at::ones_like(diagonal));
  return {Q.mul_(signs.unsqueeze(-2)).to(a.device()), R.mul_(signs.unsqueeze(-1)).to(a.device())};
}

at::Tensor is_orthonormal(const at::Tensor& Q, const at::Tensor& seen) {
  // Rounding leaves some units times the root of n; TF32 or bfloat16 products leave 2^-11 and more.
  const double tolerance = Q.scalar_type() == at::kDouble ? 1e-10 : 1e-4;
  const int64_t k = Q.size(-1);
  const at::Tensor x =
      at::arange(k, Q.options()).remainder_(2).mul_(2).sub_(1).mul(seen.unsqueeze(-2));
  const at::Tensor Qx = Q.mul(x).sum(-1, /*keepdim=*/true);
  return Q.mul(Qx).sum(-2).sub_(x.squeeze(-2)).abs_().amax(-1).le(tolerance);
}

at::Tensor is_orthonormal(const at::Tensor& Q) {
  return is_orthonormal(Q, at::ones({Q.size(-1)}, Q.options()));
}

JudgedQR settled_qr(const at::Tensor& a) {
  const auto [Q, R] = signed_qr(a);
  const at::Tensor sound = is_orthonormal(Q);
  if (sound.all().item<bool>()) return {Q, R, sound};
  const auto [wide_Q, wide_R] = signed_qr(decomposable(a).to(at::kDouble));
  const at::Tensor keeps = per_matrix(sound);
  return {at::where(keeps, Q, wide_Q.to(a.options())), at::where(keeps, R, wide_R.to(a.options())),
          sound.logical_or(is_orthonormal(wide_Q).to(a.device()))};
}

JudgedQR judged_qr(const at::Tensor& a) {
  if (a.device().is_cpu()) return settled_qr(a);
  const auto [Q, R] = signed_qr(a);
  return {Q, R, is_orthonormal(Q)};
}

std::optional<QR> checked_qr(const at::Tensor& a) {
  for (const auto dtype : {a.scalar_type(), at::kDouble}) {
    const QR qr = signed_qr(decomposable(a).to(dtype));
    if (is_orthonormal(qr.Q).item<bool>()) return QR{qr.Q.to(a.options()), qr.R.to(a.options())};
  }
  return std::nullopt;
}

namespace {

// Of a batch that is on the CPU or can be decomposed where it is.
Eigen judged_eigenvectors(const at::Tensor& a) {
  try {
    const auto [values, vectors] = at::linalg_eigh(a);
    return {values.flip(-1), vectors.flip(-1),
            is_orthonormal(vectors).logical_and_(at::isfinite(values).all(-1))};
  } catch (const c10::LinAlgError&) {  // of any in the batch
    return {at::empty({a.size(0), a.size(1)}, a.options()), at::empty_like(a),
            at::zeros({a.size(0)}, a.options().dtype(at::kBool))};
  }
}

}  // namespace

Eigen settled_eigenvectors(const at::Tensor& a) {
  const at::Tensor given = decomposable(a);
  const Eigen eigen = judged_eigenvectors(given);
  const at::Tensor sound = eigen.sound.to(at::kCPU);
  bool* is_sound = sound.mutable_data_ptr<bool>();
  for (int64_t i = 0; i < given.size(0); ++i) {
    for (const auto dtype : {given.scalar_type(), at::kDouble}) {
      if (is_sound[i]) break;
      const Eigen own = judged_eigenvectors(given.narrow(0, i, 1).to(dtype));
      eigen.values[i].copy_(own.values[0]);
      eigen.vectors[i].copy_(own.vectors[0]);
      is_sound[i] = own.sound.item<bool>();
    }
  }
  return {eigen.values.to(a.options()), eigen.vectors.to(a.options()), sound.to(a.device())};
}

}  // namespace dykaf::aten
