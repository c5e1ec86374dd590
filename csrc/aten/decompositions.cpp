#include "aten/decompositions.h"

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

at::Tensor is_orthonormal(const at::Tensor& Q) {
  // Rounding leaves some units times the root of n; TF32 or bfloat16 products leave 2^-11 and more.
  const double tolerance = Q.scalar_type() == at::kDouble ? 1e-10 : 1e-4;
  const int64_t k = Q.size(-1);
  const at::Tensor x = at::arange(k, Q.options()).remainder_(2).mul_(2).sub_(1);
  const at::Tensor Qx = Q.mul(x).sum(-1, /*keepdim=*/true);
  return Q.mul(Qx).sum(-2).sub_(x).abs_().amax(-1).le(tolerance);
}

JudgedQR judged_qr(const at::Tensor& a) {
  const auto [Q, R] = signed_qr(a);
  const at::Tensor sound = is_orthonormal(Q);
  if (!a.device().is_cpu() || sound.all().item<bool>()) return {Q, R, sound};
  const auto [wide_Q, wide_R] = signed_qr(a.to(at::kDouble));
  return {wide_Q.to(a.scalar_type()), wide_R.to(a.scalar_type()), is_orthonormal(wide_Q)};
}

std::optional<QR> checked_qr(const at::Tensor& a) {
  for (const auto dtype : {a.scalar_type(), at::kDouble}) {
    const QR qr = signed_qr(decomposable(a).to(dtype));
    if (is_orthonormal(qr.Q).item<bool>()) return QR{qr.Q.to(a.options()), qr.R.to(a.options())};
  }
  return std::nullopt;
}

std::optional<Eigen> eigenvectors(const at::Tensor& a) {
  for (const auto dtype : {a.scalar_type(), at::kDouble}) {
    try {
      const auto [values, vectors] = at::linalg_eigh(decomposable(a).to(dtype));
      if (at::isfinite(values).all().item<bool>() && is_orthonormal(vectors).item<bool>()) {
        return Eigen{values.flip(0).to(a.options()), vectors.flip(1).to(a.options())};
      }
    } catch (const c10::LinAlgError&) {
    }
  }
  return std::nullopt;
}

}  // namespace dykaf::aten
