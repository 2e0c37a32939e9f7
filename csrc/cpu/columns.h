// Work on rows in blocks, and sums over rows, the same for any number of threads: a block has its partial sums, which
// are added in order.
#pragma once

#include <algorithm>

#include "fastlm.h"
#include "parallel.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

// body(first, last) for every block of kColumnRows rows of N.
template <class Body>
void for_blocks(int64_t N, int64_t row_cost, int threads, Body&& body) {
  for_each((N + kColumnRows - 1) / kColumnRows, kColumnRows * row_cost, threads,
           [&](int64_t block) { body(block * kColumnRows, std::min(N, (block + 1) * kColumnRows)); });
}

// body(first, last, sums) for every block of kColumnRows rows of N; sums (width,) begin at zero and lie in scratch
// (blocks, width). Then out (width,) = sum of them.
template <class Body>
void column_sums(float* out, float* scratch, int64_t N, int64_t width, int64_t row_cost, int threads, Body&& body) {
  const int64_t blocks = (N + kColumnRows - 1) / kColumnRows;
  for_blocks(N, row_cost, threads, [&](int64_t first, int64_t last) {
    float* sums = scratch + first / kColumnRows * width;
    std::fill(sums, sums + width, 0.0f);
    body(first, last, sums);
  });
  constexpr int64_t kWide = 256;
  for_each((width + kWide - 1) / kWide, kWide * blocks, threads, [&](int64_t part) {
    const int64_t from = part * kWide, to = std::min(width, from + kWide);
    std::fill(out + from, out + to, 0.0f);
    for (int64_t block = 0; block < blocks; block++)
      for (int64_t c = from; c < to; c++) out[c] += scratch[block * width + c];
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
