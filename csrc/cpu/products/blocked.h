// Matrix products in fp32, a block of rows at a time: y = a b, and what is made of it while it is written.
//
// b is packed into panels of kTileColumns columns. A block of y is one thread's: of kDepth after kDepth of k it copies
// its rows of a, which then lie in the second-level cache, and multiplies them, kTileRows by kTileColumns values of y in
// registers, with one panel after the other, of which kDepth rows fill half of the first-level cache. Every value adds up
// in steps of kDepth, so that the bits depend on nothing else.
#pragma once

#include <algorithm>
#include <vector>

#include "../gelu.h"
#include "../simd.h"

namespace fastlm::cpu::FASTLM_ISA {

constexpr int kTileRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
constexpr int kTileVectors = 2;
constexpr int64_t kTileColumns = kTileVectors * kLanes;
constexpr int64_t kDepth = 256;
constexpr int64_t kLine = 16;       // floats of a cache line
constexpr int64_t kAtOnce = 4;      // panels that are packed together: more neighbours of a row of b
constexpr int64_t kRowsAhead = 12;  // rows are fetched ahead where they lie too far apart to be guessed

// y[m, n] = (sum_k a[m, k] b[k, n] + bias[n]) factor[m, n] + residual[m, n]; with gelu, gelu(y[m, n]) goes there, and the
// slope of it to y. Of a's strides one is 1, and of b's. y, factor, residual and gelu are (M, N), contiguous; what is null
// is left out.
struct Product {
  float* y;
  const float* a;  // (M, K)
  int64_t am, ak;
  const float* b;  // (K, N)
  int64_t bk, bn;
  int64_t M, N, K;
  const float* bias = nullptr;  // (N,)
  const float* factor = nullptr;
  const float* residual = nullptr;
  float* gelu = nullptr;
};

using Tile = Floats[kTileRows][kTileVectors];

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// ---- packing

inline void copy(float* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; i++) to[i] = from[i];
}

// Columns n0 … of b, at most kAtOnce panels, as panels (K, kTileColumns), one behind the other. Behind b's last column, and
// behind a's last row below, lies what lay there: nothing that is made of it is stored.
inline void pack_panels(float* panels, const Product& op, int64_t n0) {
  const float* b = op.b + n0 * op.bn;
  const int64_t columns = std::min(kAtOnce * kTileColumns, op.N - n0), panel = op.K * kTileColumns;
  if (op.bn == 1) {
    for (int64_t k = 0; k < op.K; k++)
      for (int64_t n = 0; n < columns; n += kTileColumns) {
        const float* from = b + k * op.bk + n;
        __builtin_prefetch(from + kRowsAhead * op.bk);
        copy(panels + n / kTileColumns * panel + k * kTileColumns, from, std::min(kTileColumns, columns - n));
      }
    return;
  }
  for (int64_t first = 0; first < columns; first += kTileColumns, panels += panel, b += kTileColumns * op.bn) {
    const int64_t width = std::min(kTileColumns, columns - first);
    int64_t k = 0;
    for (; width == kTileColumns && k + kLanes <= op.K; k += kLanes)
      for (int64_t n = 0; n < kTileColumns; n += kLanes)
        transpose(panels + k * kTileColumns + n, kTileColumns, b + n * op.bn + k, op.bn);
    for (; k < op.K; k++)
      for (int64_t n = 0; n < width; n++) panels[k * kTileColumns + n] = b[n * op.bn + k];
  }
}

// The sums over K of a panel's first `columns` columns.
inline void sum_panel(float* sums, const float* panel, int64_t K, int64_t columns) {
  Floats totals[kTileVectors] = {};
  for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
    Floats parts[kTileVectors] = {};
    for (int64_t k = k0; k < std::min(K, k0 + kDepth); k++)
      for (int v = 0; v < kTileVectors; v++) parts[v] += load(panel + k * kTileColumns + v * kLanes);
    for (int v = 0; v < kTileVectors; v++) totals[v] += parts[v];
  }
  for (int64_t n = 0; n < columns; n++) sums[n] = totals[n / kLanes][n % kLanes];
}

// Rows m0 … of a for `many` k from k0 on: in rows kDepth apart, or with `strips`, where a lies in columns, kTileRows rows
// by column.
template <bool strips>
void copy_block(float* to, const Product& op, int64_t m0, int64_t rows, int64_t k0, int64_t many) {
  const float* a = op.a + m0 * op.am + k0 * op.ak;
  if constexpr (strips) {
    for (int64_t k = 0; k < many; k++) {
      const float* column = a + k * op.ak;
      for (int64_t m = 0; m < rows; m += kLine) __builtin_prefetch(column + kRowsAhead * op.ak + m);
      int64_t m = 0;
      for (; m + kTileRows <= rows; m += kTileRows)
        std::memcpy(to + m * kDepth + k * kTileRows, column + m, sizeof(float) * kTileRows);
      if (m < rows) std::memcpy(to + m * kDepth + k * kTileRows, column + m, sizeof(float) * (rows - m));
    }
  } else {
    for (int64_t m = 0; m < rows; m++) copy(to + m * kDepth, a + m * op.am, many);
  }
}

// ---- multiplying

// tile = a panel over K (a[m, k] at a + m · kDepth + k, or with `strips` at a + k · kTileRows + m).
template <bool strips>
inline void multiply(Tile& tile, const float* a, const float* panel, int64_t K) {
  constexpr int64_t am = strips ? 1 : kDepth, ak = strips ? kTileRows : 1;
  Tile sums;  // not the caller's, which the compiler would keep in memory
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; m++)
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; v++) sums[m][v] = Floats{};
  const auto step = [&](int64_t k) {
    Floats row[kTileVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; v++) row[v] = load(panel + k * kTileColumns + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; m++) {
      const Floats left = broadcast(a[m * am + k * ak]);
#pragma GCC unroll 16
      for (int v = 0; v < kTileVectors; v++) sums[m][v] += left * row[v];
    }
  };
  int64_t k = 0;
  for (; k + kLine <= K; k += kLine) {
    const float* next = a + kTileRows * kDepth + k * ak;
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; m++) __builtin_prefetch(next + m * (strips ? kLine : kDepth));
#pragma GCC unroll 4
    for (int64_t i = 0; i < kLine; i++) step(k + i);
  }
  for (; k < K; k++) step(k);
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; m++)
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; v++) tile[m][v] = sums[m][v];
}

// Fetches what a tile of y will be made of, while it is multiplied.
inline void fetch_for_take(const Product& op, int64_t m, int64_t n) {
  const int64_t rows = std::min(int64_t(kTileRows), op.M - m), at = m * op.N + n;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < kTileColumns; c += kLine) {
      const int64_t place = at + i * op.N + c;
      __builtin_prefetch(op.y + place, 1);
      if (op.gelu) __builtin_prefetch(op.gelu + place, 1);
      if (op.factor) __builtin_prefetch(op.factor + place);
      if (op.residual) __builtin_prefetch(op.residual + place);
    }
}

// Fetches `part` of `parts` of a panel.
inline void fetch_panel(const float* panel, int64_t floats, int64_t part, int64_t parts) {
  const int64_t share = round_up(ceil_div(floats, parts), kLine);
  for (int64_t at = part * share; at < std::min(floats, (part + 1) * share); at += kLine)
    __builtin_prefetch(panel + at, 0, 2);
}

// A whole tile of y at (m, n): added to what is there unless it is the first, and with the last finished. What the op
// asks for is asked once.
inline void take_whole(const Product& op, Tile& tile, int64_t m, int64_t n, bool first, bool last) {
  const int64_t at = m * op.N + n;
  const auto each = [&](auto&& f) {
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 16
      for (int v = 0; v < kTileVectors; v++) f(tile[i][v], at + i * op.N + v * kLanes, v);
  };
  if (!first) each([&](Floats& value, int64_t place, int) { value += load(op.y + place); });
  if (last && op.bias) {
    Floats bias[kTileVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; v++) bias[v] = load(op.bias + n + v * kLanes);
    each([&](Floats& value, int64_t, int v) { value += bias[v]; });
  }
  if (last && op.factor) each([&](Floats& value, int64_t place, int) { value *= load(op.factor + place); });
  if (last && op.residual) each([&](Floats& value, int64_t place, int) { value += load(op.residual + place); });
  if (last && op.gelu)
    for (int i = 0; i < kTileRows; i++)  // not unrolled: it is long
      for (int v = 0; v < kTileVectors; v++) {
        const auto [slope, value] = gelu_with_slope(tile[i][v]);
        store(op.gelu + at + i * op.N + v * kLanes, value);
        tile[i][v] = slope;
      }
  each([&](Floats& value, int64_t place, int) { store(op.y + place, value); });
}

// The same for a tile of which `rows` and `columns` are y's.
inline void take_part(const Product& op, const Tile& tile, int64_t m, int64_t n, int64_t rows, int64_t columns, bool first,
                      bool last) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < columns; c++) {
      const int64_t at = (m + i) * op.N + n + c;
      float value = tile[i][c / kLanes][c % kLanes] + (first ? 0.0f : op.y[at]);
      if (last && op.bias) value += op.bias[n + c];
      if (last && op.factor) value *= op.factor[at];
      if (last && op.residual) value += op.residual[at];
      if (last && op.gelu) {
        const auto [slope, result] = gelu_with_slope(broadcast(value));
        op.gelu[at] = result[0], value = slope[0];
      }
      op.y[at] = value;
    }
}

// Memory of this thread that is kept between calls: fresh pages would cost more than the work on them.
inline float* kept(std::vector<float>& memory, int64_t floats) {
  if (int64_t(memory.size()) < floats + 16) memory.resize(floats + 16);
  return memory.data() + (-(reinterpret_cast<uintptr_t>(memory.data()) / 4) & 15);
}

// The block of y with `rows` rows from m0 and `columns` columns, a multiple of kTileColumns or to the end, from n0 on;
// panels are those of the whole b. strips: a lies in columns (am is 1).
template <bool strips>
void block(const Product& op, const float* panels, int64_t m0, int64_t rows, int64_t n0, int64_t columns) {
  thread_local std::vector<float> memory;
  float* a = kept(memory, round_up(rows, kTileRows) * kDepth);
  for (int64_t k0 = 0; k0 < op.K || k0 == 0; k0 += kDepth) {
    const int64_t many = std::min(kDepth, op.K - k0);
    const bool first = k0 == 0, last = k0 + kDepth >= op.K;
    copy_block<strips>(a, op, m0, rows, k0, many);
    for (int64_t n = n0; n < n0 + columns; n += kTileColumns)
      for (int64_t m = 0; m < rows; m += kTileRows) {
        const float* panel = panels + n * op.K + k0 * kTileColumns;
        if (last) fetch_for_take(op, m0 + m, n);
        if (n + kTileColumns < n0 + columns)
          fetch_panel(panel + kTileColumns * op.K, many * kTileColumns, m / kTileRows, ceil_div(rows, kTileRows));
        Tile tile;
        multiply<strips>(tile, a + m * kDepth, panel, many);
        const int64_t height = std::min(int64_t(kTileRows), rows - m), width = std::min(kTileColumns, op.N - n);
        if (height == kTileRows && width == kTileColumns) take_whole(op, tile, m0 + m, n, first, last);
        else take_part(op, tile, m0 + m, n, height, width, first, last);
      }
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
