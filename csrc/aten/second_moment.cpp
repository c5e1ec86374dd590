// rank_one: V ~ scale^2 l r^T, followed by the rank-one projector-splitting integrator with the
// target beta2 V + (1 - beta2) G o G (Yudin et al., arXiv 2511.06477). factored: row and column
// means (Shazeer & Stern 2018, Adafactor).
#include <ATen/ops/full_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "aten/batch_ops.h"
#include "aten/products.h"

namespace dykaf::aten {
namespace {

at::Tensor norms(const at::Tensor& vectors) {
  return at::linalg_vector_norm(vectors, 2, at::IntArrayRef({1}));
}

at::Tensor inner(const at::Tensor& x, const at::Tensor& y) { return x.mul(y).sum(1); }

// A x of each matrix A [b, m, n] and vector x [b, n].
at::Tensor times(const at::Tensor& A, const at::Tensor& x) {
  return full_product(A, x.unsqueeze(2)).squeeze(2);
}

at::Tensor scaled(const at::Tensor& x, const at::Tensor& factor) {
  return x.mul(factor.unsqueeze(1));
}

RootFactors rank_one_(Batch& batch, const Options& options, const at::Tensor& squares,
                      const at::Tensor& tau) {
  const auto wide = batch.wide_dtype();
  const at::Tensor scale = batch.get(&Matrix::exp_avg_sq_scale);
  const at::Tensor fresh = scale.eq(0).unsqueeze(1);
  const auto start = [&](Array array, int64_t size) {
    const at::Tensor old = batch.get(array).to(wide);
    return at::where(fresh, at::full_like(old, 1 / std::sqrt(static_cast<double>(size))), old);
  };
  const at::Tensor l = start(&Matrix::exp_avg_sq_row, batch.first().m);
  const at::Tensor r = start(&Matrix::exp_avg_sq_col, batch.first().n);
  const at::Tensor unit = at::maximum(tau, scale);
  const at::Tensor a = scale.div(unit).square_().mul_(options.beta2);
  const at::Tensor b = tau.div(unit).square_().mul_(1 - options.beta2);

  const at::Tensor K = scaled(l, a).add_(scaled(times(squares, r), b));
  const at::Tensor norm_K = norms(K);
  const at::Tensor u = K.div(norm_K.unsqueeze(1));
  const at::Tensor B = scaled(r, a.mul(inner(u, l))).add_(scaled(times(squares.mT(), u), b));
  const at::Tensor s = norms(B);
  const at::Tensor moves = norm_K.gt(0).logical_and_(s.gt(0));

  const at::Tensor new_l = at::where(moves.unsqueeze(1), u, l);
  const at::Tensor new_r = at::where(moves.unsqueeze(1), B.div(s.unsqueeze(1)), r);
  const at::Tensor new_scale = at::where(moves, unit.mul(s.sqrt()), scale);
  batch.set(&Matrix::exp_avg_sq_row, new_l.to(batch.dtype()));
  batch.set(&Matrix::exp_avg_sq_col, new_r.to(batch.dtype()));
  batch.set(&Matrix::exp_avg_sq_scale, new_scale);
  return {scaled(new_l.sqrt(), new_scale), new_r.sqrt()};
}

RootFactors factored_(Batch& batch, const Options& options, const at::Tensor& squares,
                      const at::Tensor& tau) {
  const at::Tensor gain = tau.square().mul_(1 - options.beta2);
  const auto advanced = [&](Array array, const at::Tensor& means) {
    return batch.get(array).to(batch.wide_dtype()).mul(options.beta2).add_(scaled(means, gain));
  };
  const at::Tensor row = advanced(&Matrix::exp_avg_sq_row, squares.mean(2));
  const at::Tensor col = advanced(&Matrix::exp_avg_sq_col, squares.mean(1));
  batch.set(&Matrix::exp_avg_sq_row, row.to(batch.dtype()));
  batch.set(&Matrix::exp_avg_sq_col, col.to(batch.dtype()));
  const at::Tensor mean = row.mean(1);
  const at::Tensor inverse = at::where(mean.gt(0), mean.rsqrt(), at::zeros_like(mean));
  return {scaled(row.sqrt(), inverse), col.sqrt()};
}

}  // namespace

RootFactors compact_second_moment_(Batch& batch, const Options& options, const at::Tensor& H,
                                   const at::Tensor& tau) {
  const at::Tensor squares = H.to(batch.wide_dtype()).square();
  const RootFactors root = options.second_moment == SecondMoment::kRankOne
                               ? rank_one_(batch, options, squares, tau)
                               : factored_(batch, options, squares, tau);
  return {root.row.to(batch.dtype()), root.col.to(batch.dtype())};
}

}  // namespace dykaf::aten
