// A matrix product on the CPU (Matmul): all threads pack b, a slice of columns at a time, then make blocks of y (matmul.h).
#include "matmul.h"

#include <omp.h>

#include "isa.h"
#include "parallel.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kBlockRows = 48, kBlockColumns = 512;  // of y
constexpr int64_t kSlice = 1 << 21;                      // floats of b that are packed at a time

}  // namespace

void matmul(const Matmul& op, int threads) {
  if (!op.N) return;
  thread_local std::vector<float> packed, sums_memory;
  const int64_t slice = std::min(up(op.N, kTileColumns), up(std::max(kSlice / std::max(op.K, int64_t(1)), int64_t(1)),
                                                            kTileColumns));
  float* panels = kept(packed, slice * op.K);
  float* sums = kept(sums_memory, op.column_sums ? slice : 0);
  const bool alone = threads <= 1 || op.M * op.N * op.K < kSmall;

  // Blocks of y: about as large as the caches want them, and enough for every thread to find work.
  const int64_t rows = up(ceil(std::max(op.M, int64_t(1)), std::max(ceil(op.M, kBlockRows), int64_t(1))), kTileRows);
  const int64_t row_blocks = ceil(op.M, rows);
  int64_t columns = std::min(kBlockColumns, slice);
  while (columns > 4 * kTileColumns && row_blocks * ceil(std::min(slice, op.N), columns) < 4 * threads) columns /= 2;
  columns = up(columns, kTileColumns);

#pragma omp parallel num_threads(alone ? 1 : threads)
  for (int64_t n0 = 0; n0 < op.N; n0 += slice) {
    const int64_t end = std::min(op.N, n0 + slice), many = ceil(end - n0, kTileColumns);
#pragma omp for schedule(dynamic, 4)
    for (int64_t p = 0; p < many; p++)
      with(op.b_dtype, [&](auto t) {
        pack_panel<decltype(t)>(panels + p * kTileColumns * op.K, sums + p * kTileColumns, op, n0 + p * kTileColumns);
      });
    const int64_t column_blocks = ceil(end - n0, columns);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < row_blocks * column_blocks; i++) {
      const int64_t m0 = i % row_blocks * rows, c0 = i / row_blocks * columns;
      const auto make = op.stride_ak == 1 ? block<false> : block<true>;
      make(op, panels + c0 * op.K, m0, std::min(rows, op.M - m0), n0 + c0, std::min(columns, end - n0 - c0));
    }
#pragma omp single
    if (op.column_sums) std::copy_n(sums, end - n0, op.column_sums + n0);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
