#include "aten/orthonormal_rows.h"

#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "aten/bounds.h"
#include "aten/decompositions.h"
#include "aten/products.h"

namespace dykaf::aten {
namespace {

constexpr int kShiftedPasses = 3;
constexpr double kLeastOwn = 0.25;  // the square of a share of a row's length

struct Cholesky {
  at::Tensor factor;  // [b, n, n], lower triangular
  at::Tensor sound;   // bool [b]
};

Cholesky cholesky(const at::Tensor& S) {
  auto [factor, info] = at::linalg_cholesky_ex(S, /*upper=*/false, /*check_errors=*/false);
  return {std::move(factor), info.eq(0)};
}

// 1 where it holds, else 0.
at::Tensor number_of(const at::Tensor& condition, const at::Tensor& like) {
  return condition.to(like.scalar_type());
}

// S [b, n, n] with 1 added to the diagonal where `is_live` [b, n] is 0.
at::Tensor unit_where_dead(at::Tensor S, const at::Tensor& is_live) {
  S.diagonal(0, 1, 2).sub_(is_live).add_(1);
  return S;
}

}  // namespace

OrthonormalRows orthonormal_rows(const at::Tensor& rows) {
  const int64_t num = rows.size(1);
  const double noise = rounding_share_of(rows, 1);
  // Twice what sums of products were seen to lose where all terms have one sign.
  const double shift = 2 * noise * static_cast<double>(num);
  const at::Tensor identity = at::eye(num, rows.options()).unsqueeze(0);
  const at::Tensor small_identity = decomposable(identity);

  at::Tensor X = rows;
  at::Tensor T;        // the given rows are T X
  at::Tensor is_live;  // 1 or 0 [b, num]
  at::Tensor sound = at::ones({rows.size(0)}, rows.options().dtype(at::kBool));
  for (int pass = 0;; ++pass) {
    const at::Tensor gram = full_product(X, X.mT());
    const at::Tensor squares = gram.diagonal(0, 1, 2);
    // As in without_noise_rows: what is shorter is rounding beside the longest.
    if (pass == 0) is_live = number_of(squares.gt(squares.amax(1, true).mul(noise * noise)), X);
    const at::Tensor lengths = squares.sqrt().mul_(is_live);
    const at::Tensor scales = at::where(is_live.gt(0), lengths, 1).reciprocal_().mul_(is_live);
    const at::Tensor S = decomposable(
        unit_where_dead(gram.mul(scales.unsqueeze(1)).mul_(scales.unsqueeze(2)), is_live));
    Cholesky K = cholesky(S.add(small_identity, shift));
    sound.logical_and_(K.sound.to(X.device()));
    const bool is_last = pass == kShiftedPasses;
    if (is_last) {
      const at::Tensor is_kept = number_of(K.factor.diagonal(0, 1, 2).square().ge(kLeastOwn), S);
      is_live = is_live.mul(is_kept.to(X.device()));
      K = cholesky(
          unit_where_dead(S.mul(is_kept.unsqueeze(1)).mul_(is_kept.unsqueeze(2)), is_kept));
      sound.logical_and_(K.sound.to(X.device()));
    }
    const at::Tensor inverse =
        at::linalg_solve_triangular(K.factor, small_identity.expand_as(S), /*upper=*/false);
    // Rows that are left out have a part along those that are not.
    const at::Tensor lower = (is_last ? full_product(S, inverse.mT()) : K.factor).to(X.device());
    const at::Tensor back = lower.mul(is_live.unsqueeze(1)).mul_(lengths.unsqueeze(2));
    const at::Tensor turn =
        inverse.to(X.device()).mul(scales.unsqueeze(1)).mul_(is_live.unsqueeze(2));
    T = pass == 0 ? back : full_product(T, back);
    if (is_last) return {X, turn, T, sound};
    X = full_product(turn, X);
  }
}

}  // namespace dykaf::aten
