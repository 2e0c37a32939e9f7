// Blocks of a matrix product y = a b + bias and more, with a (M, K) and b (K, N) in rows or in columns (Matmul).
//
// b is packed into panels of kTileColumns columns. A block of y is one thread's: of kDepth after kDepth of k it copies
// its rows of a, which then lie in the second-level cache, and multiplies them, kTileRows by kTileColumns values of y in
// registers, with one panel after the other, of which kDepth rows fill half of the first-level cache. What is narrower
// is widened to fp32 where it is copied. Every value adds up in steps of kDepth, so that the bits depend on nothing else.
#pragma once

#include <algorithm>
#include <vector>

#include "gelu.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;
constexpr int64_t kTileColumns = kTileVectors * kLanes;
constexpr int64_t kLine = 16;  // floats of a cache line
constexpr int64_t kDepth = 256;

using Tile = Floats[kTileRows][kTileVectors];

inline int64_t ceil(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t up(int64_t n, int64_t multiple) { return ceil(n, multiple) * multiple; }

// f(T{}) for the T of a dtype.
template <class F>
void with(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(Bf16{});
    case DType::f16: return f(Fp16{});
  }
}

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

// to[0 … count) = from as fp32, then zeros up to `padded`.
template <class T>
inline void copy(float* to, const T* from, int64_t count, int64_t padded) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; i++) to[i] = to_float(from[i]);
  for (; i < padded; i++) to[i] = 0.0f;
}

// Columns n0 … of b, at most kTileColumns, as a panel (K, kTileColumns), and their sums (kTileColumns,).
template <class T>
void pack_panel(float* panel, float* sums, const Matmul& op, int64_t n0) {
  const T* b = static_cast<const T*>(op.b) + n0 * op.stride_bn;
  const int64_t columns = std::min(kTileColumns, op.N - n0);
  if (op.stride_bn == 1) {
    for (int64_t k = 0; k < op.K; k++) copy(panel + k * kTileColumns, b + k * op.stride_bk, columns, kTileColumns);
  } else {
    for (int64_t k0 = 0; k0 < op.K; k0 += kLanes) {
      const int64_t many = std::min(int64_t(kLanes), op.K - k0);
      for (int64_t n = 0; n < columns; n++) {
        const T* from = b + n * op.stride_bn + k0 * op.stride_bk;
        for (int64_t k = 0; k < many; k++) panel[(k0 + k) * kTileColumns + n] = to_float(from[k * op.stride_bk]);
      }
      for (int64_t k = 0; k < many; k++)
        for (int64_t n = columns; n < kTileColumns; n++) panel[(k0 + k) * kTileColumns + n] = 0.0f;
    }
  }
  if (!op.column_sums) return;
  for (int v = 0; v < kTileVectors; v++) {
    Floats total{};
    for (int64_t k0 = 0; k0 < op.K; k0 += kDepth) {
      Floats part{};
      for (int64_t k = k0; k < std::min(op.K, k0 + kDepth); k++) part += load(panel + k * kTileColumns + v * kLanes);
      total += part;
    }
    store(sums + v * kLanes, total);
  }
}

// Rows m0 … of a for `many` k from k0 on: in rows kDepth apart, or with `strips` kTileRows rows by column; zeros behind
// the last row up to a whole strip.
template <class T, bool strips>
void copy_block(float* to, const Matmul& op, int64_t m0, int64_t rows, int64_t k0, int64_t many) {
  const T* a = static_cast<const T*>(op.a) + m0 * op.stride_am + k0 * op.stride_ak;
  const int64_t padded = up(rows, kTileRows);
  if constexpr (strips) {
    for (int64_t k = 0; k < many; k++)
      for (int64_t m = 0; m < padded; m += kTileRows) {
        const T* from = a + k * op.stride_ak + m * op.stride_am;
        float* strip = to + m * kDepth + k * kTileRows;
        if (m + kTileRows <= rows && op.stride_am == 1) {
#pragma GCC unroll 16
          for (int i = 0; i < kTileRows; i++) strip[i] = to_float(from[i]);
        } else {
          for (int64_t i = 0; i < kTileRows; i++) strip[i] = m + i < rows ? to_float(from[i * op.stride_am]) : 0.0f;
        }
      }
  } else {
    for (int64_t m = 0; m < rows; m++) copy(to + m * kDepth, a + m * op.stride_am, many, many);
    for (int64_t m = rows; m < padded; m++) std::fill_n(to + m * kDepth, many, 0.0f);
  }
}

// Where the sums of a block of y add up, ld apart: in y itself where that is fp32.
struct Sums {
  float* at;
  int64_t ld;
};

// What y becomes once its sums are whole: with the bias, times gelu'(slope_of), plus the residual; gelu(y) beside it.
inline Floats finish(const Matmul& op, int64_t m, int64_t n, int64_t left, Floats value) {
  const auto part = [&](const float* from) { return left >= kLanes ? load(from) : load_tail(from, left, 0.0f); };
  const int64_t at = m * op.stride_ym + n;
  if (op.bias) value += part(op.bias + n);
  if (op.slope_of) value *= gelu_slope(part(op.slope_of + at));
  if (op.residual) value += part(op.residual + at);
  if (op.gelu) {
    if (left >= kLanes) store(op.gelu + at, gelu(value));
    else store_tail(op.gelu + at, gelu(value), left);
  }
  return value;
}

// A whole tile: added to the sums unless it is the first, and with the last made y, as `finish` does it.
template <class T>
inline void take_whole(const Matmul& op, const Tile& tile, float* sums, int64_t ld, T* y, int64_t m, int64_t n,
                       bool first, bool last) {
  Tile values;
  const auto each = [&](auto&& f) {
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 16
      for (int v = 0; v < kTileVectors; v++) f(values[i][v], i, v);
  };
  each([&](Floats& value, int i, int v) { value = tile[i][v]; });
  if (!first) each([&](Floats& value, int i, int v) { value += load(sums + i * ld + v * kLanes); });
  if (!last) return each([&](Floats& value, int i, int v) { store(sums + i * ld + v * kLanes, value); });
  const int64_t at = m * op.stride_ym + n;
  if (op.bias) {
    Floats bias[kTileVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; v++) bias[v] = load(op.bias + n + v * kLanes);
    each([&](Floats& value, int, int v) { value += bias[v]; });
  }
  const auto beside = [&](const float* from, int i, int v) { return load(from + at + i * op.stride_ym + v * kLanes); };
  if (op.slope_of) {
    for (int i = 0; i < kTileRows; i++)
      for (int v = 0; v < kTileVectors; v++) values[i][v] *= gelu_slope(beside(op.slope_of, i, v));
  }
  if (op.residual) each([&](Floats& value, int i, int v) { value += beside(op.residual, i, v); });
  if (op.gelu) {
    for (int i = 0; i < kTileRows; i++)
      for (int v = 0; v < kTileVectors; v++) store(op.gelu + at + i * op.stride_ym + v * kLanes, gelu(values[i][v]));
  }
  each([&](Floats& value, int i, int v) { store(y + i * op.stride_ym + v * kLanes, value); });
}

// Adds a tile to the sums, those that are there already unless it is the first, and after the last writes y.
template <class T>
inline void take(const Matmul& op, const Sums& sums, const Tile& tile, int64_t m0, int64_t n0, int64_t m, int64_t n,
                 bool first, bool last) {
  const int64_t rows = std::min(int64_t(kTileRows), op.M - m0 - m), columns = std::min(kTileColumns, op.N - n0 - n);
  float* at = sums.at + m * sums.ld + n;
  T* y = static_cast<T*>(op.y) + (m0 + m) * op.stride_ym + n0 + n;
  if (rows == kTileRows && columns == kTileColumns) return take_whole(op, tile, at, sums.ld, y, m0 + m, n0 + n, first, last);
  for (int64_t i = 0; i < rows; i++)
    for (int v = 0; v < kTileVectors; v++) {
      const int64_t c = v * kLanes, left = columns - c;
      if (left <= 0) break;
      float* sum_at = at + i * sums.ld + c;
      T* y_at = y + i * op.stride_ym + c;
      Floats value = tile[i][v];
      if (!first) value += left >= kLanes ? load(sum_at) : load_tail(sum_at, left, 0.0f);
      if (last) value = finish(op, m0 + m + i, n0 + n + c, left, value);
      if (left >= kLanes) {
        if (last) store(y_at, value);
        else store(sum_at, value);
      } else {
        if (last) store_tail(y_at, value, left);
        else store_tail(sum_at, value, left);
      }
    }
}

// Memory of this thread that is kept between calls: fresh pages would cost more than the work on them.
inline float* kept(std::vector<float>& memory, int64_t floats) {
  if (int64_t(memory.size()) < floats + 16) memory.resize(floats + 16);
  return memory.data() + (-(reinterpret_cast<uintptr_t>(memory.data()) / 4) & 15);
}

// The block of y with `rows` rows from m0 and `columns` columns from n0 on, whose panels lie one after the other.
template <bool strips>
void block(const Matmul& op, const float* panels, int64_t m0, int64_t rows, int64_t n0, int64_t columns) {
  thread_local std::vector<float> memory;
  const int64_t padded = up(rows, kTileRows), wide = up(columns, kTileColumns);
  float* a = kept(memory, padded * kDepth + (op.dtype == DType::f32 ? 0 : padded * wide));
  Sums sums{a + padded * kDepth, wide};
  if (op.dtype == DType::f32) sums = {static_cast<float*>(op.y) + m0 * op.stride_ym + n0, op.stride_ym};
  for (int64_t k0 = 0; k0 < op.K || k0 == 0; k0 += kDepth) {
    const int64_t many = std::min(kDepth, op.K - k0);
    with(op.a_dtype, [&](auto t) { copy_block<decltype(t), strips>(a, op, m0, rows, k0, many); });
    for (int64_t n = 0; n < columns; n += kTileColumns)
      for (int64_t m = 0; m < rows; m += kTileRows) {
        Tile tile;
        multiply<strips>(tile, a + m * kDepth, panels + n * op.K + k0 * kTileColumns, many);
        const bool first = k0 == 0 && !op.add, last = k0 + kDepth >= op.K;
        with(op.dtype, [&](auto t) { take<decltype(t)>(op, sums, tile, m0, n0, m, n, first, last); });
      }
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
