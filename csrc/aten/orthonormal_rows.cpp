#include "aten/orthonormal_rows.h"

#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/zeros.h>

#include "aten/bounds.h"
#include "aten/decompositions.h"
#include "aten/products.h"

namespace dykaf::aten {
namespace {

constexpr int kShiftedPasses = 3;
constexpr double kLeastOwn = 0.25;  // the square of a share of a row's length

}  // namespace

OrthonormalRows orthonormal_rows(const at::Tensor& rows) {
  const int64_t num = rows.size(1);
  const double noise = rounding_share_of(rows, 1);
  // Twice what sums of products were seen to lose where all terms have one sign.
  const double shift = 2 * noise * static_cast<double>(num);
  const at::Tensor identity = decomposable(at::eye(num, rows.options())).unsqueeze(0);
  const at::Tensor zero = at::zeros({}, rows.options());
  at::Tensor failures = at::zeros({rows.size(0)}, identity.options().dtype(at::kInt));
  const auto cholesky = [&](const at::Tensor& S) {
    const auto [factor, info] = at::linalg_cholesky_ex(S, /*upper=*/false, /*check_errors=*/false);
    failures.add_(info);
    return factor;
  };

  at::Tensor X = rows;
  at::Tensor is_live;  // bool [b, num]
  at::Tensor dead;     // 1 or 0 [b, num]
  for (int pass = 0;; ++pass) {
    const at::Tensor gram = full_product(X, X.mT());
    const at::Tensor squares = gram.diagonal(0, 1, 2);
    if (pass == 0) {
      // As in without_noise_rows: what is shorter is rounding beside the longest.
      is_live = squares.gt(squares.amax(1, /*keepdim=*/true).mul(noise * noise));
      dead = decomposable(is_live.logical_not().to(rows.scalar_type()));
    }
    const at::Tensor scales = at::where(is_live, squares.rsqrt(), zero);
    at::Tensor S = decomposable(gram.mul(scales.unsqueeze(1)).mul_(scales.unsqueeze(2)));
    S.diagonal(0, 1, 2).add_(dead).add_(shift);
    at::Tensor K = cholesky(S);
    at::Tensor is_kept;
    const bool is_last = pass == kShiftedPasses;
    if (is_last) {
      is_kept = K.diagonal(0, 1, 2).square().ge(kLeastOwn).to(S.scalar_type());
      S = S.mul(is_kept.unsqueeze(1)).mul_(is_kept.unsqueeze(2));
      S.diagonal(0, 1, 2).sub_(is_kept, 1 + shift).add_(1);
      K = cholesky(S);
    }
    at::Tensor turn = at::linalg_solve_triangular(K, identity.expand_as(S), /*upper=*/false);
    if (is_last) turn = turn.mul(is_kept.unsqueeze(2));
    turn = turn.to(X.device()).mul(scales.unsqueeze(1));
    if (is_last) return {X, turn, failures.eq(0).to(X.device())};
    X = full_product(turn, X);
  }
}

}  // namespace dykaf::aten
