// W <- W (1 - lr weight_decay) - lr update, for every parameter dtype. dykaf/rounding.h has the
// stochastic rounding; here it is in integer operations on tensors, to the same bits.
#include <ATen/ops/copysign.h>
#include <ATen/ops/full_like.h>

#include <algorithm>
#include <bit>
#include <limits>

#include "aten/batch_ops.h"
#include "dykaf/rounding.h"

namespace dykaf::aten {
namespace {

int64_t as_signed(uint64_t bits) { return std::bit_cast<int64_t>(bits); }

// x >> shift without copies of the sign.
at::Tensor shifted(const at::Tensor& x, int64_t shift) {
  return x.bitwise_right_shift(shift).bitwise_and_((int64_t{1} << (64 - shift)) - 1);
}

// mix64 of each entry; products of int64 wrap as those of uint64 do.
at::Tensor mixed(at::Tensor x) {
  x = x.bitwise_xor(shifted(x, 30)).mul_(as_signed(0xbf58476d1ce4e5b9ull));
  x = x.bitwise_xor(shifted(x, 27)).mul_(as_signed(0x94d049bb133111ebull));
  return x.bitwise_xor(shifted(x, 31));
}

// 32 random bits of each entry of the matrices, [b, m, n], at the batch's step.
at::Tensor random_bits(const Batch& batch, uint64_t seed) {
  const at::Tensor streams =
      batch.numbers([&](const Matrix& w) { return as_signed(stream_key(seed, w.stream)); });
  const at::Tensor keys = mixed(streams.add(batch.get(&Matrix::step).to(at::kLong)));
  const Matrix& first = batch.first();
  const auto part = [&](uint64_t Place::* field) {
    return per_matrix(batch.numbers([&](const Matrix& w) { return as_signed(w.place.*field); }));
  };
  at::Tensor elements = at::arange(first.size(), streams.options()).view({first.m, first.n});
  if (first.place.run != 0) {
    const at::Tensor run = part(&Place::run);
    elements = elements.div(run, "floor").mul_(part(&Place::stride)).add_(elements.remainder(run));
  }
  elements = elements.add(part(&Place::first)).mul_(as_signed(kElementStride));
  return shifted(mixed(elements.add_(per_matrix(keys))), 32);
}

bool have_one_rate(const Batch& batch) {
  const Rate& rate = batch.first().rate;
  return std::all_of(batch.matrices().begin(), batch.matrices().end(), [&](const Matrix* w) {
    return w->rate.lr == rate.lr && w->rate.weight_decay == rate.weight_decay;
  });
}

// float32 numbers that the dtype holds exactly.
at::Tensor rounded_to_bfloat16(const at::Tensor& x, const at::Tensor& random) {
  constexpr int64_t kKeptBits = -65536;
  const at::Tensor bits = x.view(at::kInt).add(random.bitwise_right_shift(16).to(at::kInt));
  return bits.bitwise_and(kKeptBits).view(at::kFloat);
}

at::Tensor rounded_to_float16(const at::Tensor& x, const at::Tensor& random) {
  constexpr int64_t kKeptBits = -8192;
  const at::Tensor magnitude = x.abs();
  const at::Tensor uniform = random.bitwise_right_shift(8).to(at::kFloat).mul_(0x1p-24);
  const at::Tensor small = magnitude.mul(0x1p24).add_(uniform).floor_().mul_(0x1p-24);
  const at::Tensor bits = magnitude.view(at::kInt).add(random.bitwise_right_shift(19).to(at::kInt));
  const at::Tensor large = bits.bitwise_and(kKeptBits).view(at::kFloat);
  const at::Tensor infinite = at::full_like(large, std::numeric_limits<double>::infinity());
  const at::Tensor rounded =
      at::where(magnitude.lt(0x1p-14), small, at::where(large.gt(65504), infinite, large));
  return at::copysign(rounded, x);
}

}  // namespace

void apply_update_(Batch& batch, const Inputs& inputs, const at::Tensor& updates) {
  const bool has_master = batch.first().master.defined();
  const at::Tensor W = batch.get(has_master ? &Matrix::master : &Matrix::param).to(batch.dtype());
  at::Tensor next;
  if (const Rate rate = batch.first().rate; !inputs.lr && have_one_rate(batch)) {
    next =
        W.mul(1 - rate.lr * rate.weight_decay).sub_(updates.mul(rate.lr));  // as below, to the bit
  } else {
    const at::Tensor lr = inputs.lr ? inputs.lr->to(batch.wide_dtype())
                                    : batch.reals([](const Matrix& w) { return w.rate.lr; });
    const at::Tensor decay = batch.reals([](const Matrix& w) { return w.rate.weight_decay; });
    const at::Tensor keep = lr.mul(decay).neg_().add_(1);
    const auto of_matrix = [&](const at::Tensor& x) { return per_matrix(x.to(batch.dtype())); };
    next = W.mul(of_matrix(keep)).sub_(updates.mul(of_matrix(lr)));
  }
  const at::ScalarType dtype = batch.first().param.scalar_type();
  if (has_master) {
    batch.set(&Matrix::master, next);
  } else if (dtype == at::kBFloat16 || dtype == at::kHalf) {
    const at::Tensor random = random_bits(batch, inputs.options.seed);
    // Infinity and the quiet NaN of arithmetic have no bits to round.
    next =
        dtype == at::kHalf ? rounded_to_float16(next, random) : rounded_to_bfloat16(next, random);
  }
  batch.set(&Matrix::param, next.to(dtype));
}

}  // namespace dykaf::aten
