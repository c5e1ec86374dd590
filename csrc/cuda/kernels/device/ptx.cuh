// The only PTX of the project: asynchronous copies, matrix fragments, tensor-core products.
// Compute capability 8.0 and later. Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k8"
// and "for mma.m16n8k16".
#pragma once

#include "cuda/kernels/device/platform.cuh"

#if defined(__CUDACC__)

namespace dykaf::cuda {

DYKAF_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory, or fills them with zeros without reading src. Both are 16-byte
// aligned.
DYKAF_DEVICE void cp_async16_or_zeros(void* dst, const void* src, bool copies) {
  asm volatile(
      "{\n.reg .pred ignore;\nsetp.eq.s32 ignore, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, ignore;\n}\n" ::"r"(shared_address(dst)),
      "l"(src), "r"(static_cast<int>(copies))
      : "memory");
}

// The same with the first `bytes` (0 or 4) of 4 bytes; src must be a mapped address even for 0.
DYKAF_DEVICE void cp_async4(void* dst, const void* src, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(dst)),
               "l"(src), "r"(bytes)
               : "memory");
}

DYKAF_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's newest groups are in flight.
template <int kPending>
DYKAF_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit entries; lanes 8 i .. 8 i + 7 give the rows of matrix i.
DYKAF_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// To nearest; the low 13 bits of the result are unspecified. Ties go to even where that is one
// instruction, else away from zero.
DYKAF_DEVICE uint32_t round_tf32(float x) {
  uint32_t r;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;\n" : "=r"(r) : "f"(x));
#else
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(r) : "f"(x));
#endif
  return r;
}

DYKAF_DEVICE uint32_t pack_bf16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

DYKAF_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DYKAF_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d[i][j] += a[i] b[j] over the fragments of a warp's tile.
template <int kTilesM, int kTilesN>
DYKAF_DEVICE void mma_tile_tf32(float (&d)[kTilesM][kTilesN][4], const uint32_t (&a)[kTilesM][4],
                                const uint32_t (&b)[kTilesN][2]) {
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) mma_m16n8k8_tf32(d[i][j], a[i], b[j]);
  }
}

template <int kTilesM, int kTilesN>
DYKAF_DEVICE void mma_tile_bf16(float (&d)[kTilesM][kTilesN][4], const uint32_t (&a)[kTilesM][4],
                                const uint32_t (&b)[kTilesN][2]) {
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) mma_m16n8k16_bf16(d[i][j], a[i], b[j]);
  }
}

DYKAF_DEVICE float load_shared(const float* p) { return *p; }

// 16 bytes at once from and to 16-byte aligned global memory. Pointers that come out of a struct
// are generic to the compiler; these say that they are global.
DYKAF_DEVICE float4 load_global4(const float* p) {
  float4 v;
  asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}

DYKAF_DEVICE void store_global4(float* p, float4 v) {
  asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};\n" ::"l"(__cvta_generic_to_global(p)),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

DYKAF_DEVICE uint4 load_global_16bytes(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}

DYKAF_DEVICE void store_global_16bytes(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};\n" ::"l"(__cvta_generic_to_global(p)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

}  // namespace dykaf::cuda

#endif
