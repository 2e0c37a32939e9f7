// Small matrix products on tiles that lie in a core's own caches.
#pragma once

#include "../simd.h"

namespace fastlm::cpu::FASTLM_ISA {

// Rows and vectors of C that stay in registers.
constexpr int kRows = 4, kVectors = kLanes == 16 ? 4 : 2;

// C (kRows, vectors · kLanes) = or += A B over K, A's elements broadcast, B's rows loaded.
template <bool add, int vectors>
inline void product_in_registers(float* c, int64_t ldc, const float* a, int64_t am, int64_t ak, const float* b,
                                 int64_t ldb, int64_t K) {
  Floats sums[kRows][vectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; m++)
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n++) sums[m][n] = add ? load(c + m * ldc + n * kLanes) : Floats{};
  for (int64_t k = 0; k < K; k++) {
    Floats row[vectors];
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n++) row[n] = load(b + k * ldb + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++) {
      const Floats left = broadcast(a[m * am + k * ak]);
#pragma GCC unroll 8
      for (int n = 0; n < vectors; n++) sums[m][n] += left * row[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; m++)
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n++) store(c + m * ldc + n * kLanes, sums[m][n]);
}

// C (M, N) = or += A (M, K) B (K, N) with A[m, k] = a[m · am + k · ak] and rows of B and C ldb and ldc apart; M is a
// multiple of kRows, N of kLanes. What of it is needed a Part says: for the columns from n on the rows from first_row(n)
// on, and for kRows rows from m on the k from begin(m) to end(m).
template <bool add, class Part>
void product(float* c, int64_t ldc, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, int64_t M,
             int64_t N, const Part& part) {
  for (int64_t n = 0; n < N;) {
    const int64_t left = (N - n) / kLanes;
    for (int64_t m = part.first_row(n); m < M; m += kRows) {
      const int64_t k = part.begin(m), K = part.end(m) - k;
      float* to = c + m * ldc + n;
      const float *from = a + m * am + k * ak, *right = b + k * ldb + n;
      if (left >= kVectors)
        product_in_registers<add, kVectors>(to, ldc, from, am, ak, right, ldb, K);
      else
        product_in_registers<add, 1>(to, ldc, from, am, ak, right, ldb, K);
    }
    n += (left >= kVectors ? kVectors : 1) * kLanes;
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
