// Which products go to a library, and how it reads them.
#include "dykaf/cuda_library.h"

namespace dykaf::cuda {

bool Products::are_by_library(GemmForm form, int64_t m, int64_t n, int64_t k) const {
  if (library == nullptr || precision == MatmulPrecision::kHighest || is_symmetric(form)) {
    return false;
  }
  for (const ProductRule& rule : rules) {
    if (rule.precision == precision && rule.form == form && rule.m.has(m) && rule.n.has(n) &&
        rule.k.has(k)) {
      return rule.by_library;
    }
  }
  return false;
}

BlasBatch column_major(GemmForm form, int32_t m, int32_t n, int32_t k) {
  BlasBatch batch{};
  batch.transpose_a = transposes_b(form);
  batch.transpose_b = transposes_a(form);
  batch.m = n;
  batch.n = m;
  batch.k = k;
  batch.lda = transposes_b(form) ? k : n;  // the length of a row of B
  batch.ldb = transposes_a(form) ? m : k;  // of A
  batch.ldd = n;
  return batch;
}

}  // namespace dykaf::cuda
