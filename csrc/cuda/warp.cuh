// What a warp does as one: products on the tensor cores, the matrix loads that feed them, copies in the background.
//
// Fragments are those of mma.sync.m16n8k16 (PTX ISA, "Matrix Fragments"), lane = 4 g + q: of d (16, 8) a lane holds rows
// g and g + 8, columns 2 q and 2 q + 1; of a (16, 16) the same rows, columns 2 q, 2 q + 1 and those + 8; of b (16, 8)
// rows 2 q, 2 q + 1 and those + 8 of column g. Two 16-bit elements share a register.
#pragma once

#include "common.cuh"

#ifdef FASTLM_EMULATED
#include "warp_on_cpu.h"
#else

namespace fastlm::cuda {

// d (16, 8) += a (16, 16) b (16, 8), sums in fp32.
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four (8, 8) matrices from shared memory: lane l names row l % 8 of matrix l / 8 and gets elements 2 q, 2 q + 1 of row
// g of each; transposed, it gets rows 2 q, 2 q + 1 of column g.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row))) : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row))) : "memory");
}

// 16 bytes on their way to shared memory; a thread's copies have arrived, for itself, after wait_for_copies.
__device__ inline void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :: "r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace fastlm::cuda
#endif

namespace fastlm::cuda {

__device__ inline uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
__device__ inline uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

}  // namespace fastlm::cuda
