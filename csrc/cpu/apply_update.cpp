// W <- W (1 - lr weight_decay) - lr update, in one pass, for every parameter dtype.
#include "cpu/each_matrix.h"
#include "cpu/linalg.h"
#include "cpu/loops.h"
#include "cpu/matrix.h"
#include "dykaf/ops.h"
#include "dykaf/rounding.h"

namespace dykaf::cpu {
namespace {

c10::BFloat16 round_stochastically(float x, uint32_t random, const c10::BFloat16*) {
  return c10::BFloat16(round_to_bfloat16(x, random), c10::BFloat16::from_bits());
}

c10::Half round_stochastically(float x, uint32_t random, const c10::Half*) {
  return static_cast<c10::Half>(round_to_float16(x, random));
}

template <typename T>
struct Decay {
  explicit Decay(const Rate& rate)
      : keep(static_cast<T>(1 - rate.lr * rate.weight_decay)), lr(static_cast<T>(rate.lr)) {}
  T operator()(T value, T update) const { return value * keep - lr * update; }

  T keep;
  T lr;
};

template <typename T, typename Param>
void apply_range_(const Problem<T>& p, const Options& options, const T* update, int64_t begin,
                  int64_t end, Param* param) {
  const Decay<T> decay(p.rate);
  const int64_t size = end - begin;
  param += begin;
  if (p.master != nullptr) {
    T* master = p.master + begin;
    for (int64_t i = 0; i < size; ++i) {
      master[i] = decay(master[i], update[i]);
      param[i] = static_cast<Param>(master[i]);
    }
  } else if constexpr (std::is_same_v<Param, float> || std::is_same_v<Param, double>) {
    for (int64_t i = 0; i < size; ++i) {
      param[i] = static_cast<Param>(decay(static_cast<T>(param[i]), update[i]));
    }
  } else {
    const uint64_t key = rounding_key(options.seed, p.stream, static_cast<uint64_t>(*p.step));
    for (int64_t i = 0; i < size; ++i) {
      const float value = static_cast<float>(decay(static_cast<T>(param[i]), update[i]));
      param[i] = round_stochastically(value, random_bits(key, p.place.element(begin + i)), param);
    }
  }
}

}  // namespace

template <typename T>
void apply_range_(const Problem<T>& p, const Options& options, const T* update, int64_t begin,
                  int64_t end) {
  visit_dtype(p.dtype, [&](auto* type) {
    apply_range_(p, options, update, begin, end, static_cast<decltype(type)>(p.param));
  });
}

template <typename T>
void apply_update_(const Problem<T>& p, const Options& options, const T* update) {
  for_chunks(p.size(), [&](int64_t, int64_t begin, int64_t end) {
    apply_range_(p, options, update + begin, begin, end);
  });
}

template <typename T>
void apply_update_(std::span<const Problem<T>> problems, const Options& options,
                   const T* const* updates) {
  for_each_matrix(problems, [&](size_t i) { apply_update_(problems[i], options, updates[i]); });
}

template void apply_range_(const Problem<float>&, const Options&, const float*, int64_t, int64_t);
template void apply_range_(const Problem<double>&, const Options&, const double*, int64_t, int64_t);
template void apply_update_(const Problem<float>&, const Options&, const float*);
template void apply_update_(const Problem<double>&, const Options&, const double*);
template void apply_update_(std::span<const Problem<float>>, const Options&, const float* const*);
template void apply_update_(std::span<const Problem<double>>, const Options&, const double* const*);

}  // namespace dykaf::cpu
