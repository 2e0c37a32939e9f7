// Rows of fp32 into what the packed weights multiply (panel.h), and the norm that goes before.
#pragma once

#include <algorithm>
#include <cmath>

#include "panel.h"

namespace fastlm::cpu::FASTLM_ISA {

// Rows of activations as the weights take them: (rows, ld bytes), with a scale a row for int8.
struct Acts {
  char* x;
  float* scale;
  int64_t ld;

  template <class W>
  typename W::Act* row(int64_t m) const { return reinterpret_cast<typename W::Act*>(x + m * ld); }
};

inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The bytes from one row of K to the next: lines of a cache, an odd number, since rows a power of two apart collide there.
inline int64_t row_stride(Weights weights, int64_t K) {
  const int64_t whole = up(K, Int4Weights::kGroup);
  const auto bytes = [&] {
    switch (weights) {
      case Weights::f32: return 4 * whole;
      case Weights::bf16: return int64_t(sizeof(Bf16Weights::Act)) * whole;
      case Weights::int8: return whole;
      case Weights::int4: return whole + whole / Int4Weights::kGroup * 4;
    }
    return int64_t(0);
  };
  return (up(bytes(), 64) / 64 | 1) * 64;
}

inline void write_row(float* to, float*, const float* row, int64_t K) { std::memcpy(to, row, 4 * K); }

inline void write_row(Bf16* to, float*, const float* row, int64_t K) {
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) store(to + k, load(row + k));
  for (; k < K; k++) to[k] = from_float<Bf16>(row[k]);
}

// The numbers of a row in units of scale = largest / 127, plus `zero`; a row that is not finite has a scale of NaN.
template <class Byte>
inline void round_row(Byte* to, float* scale, const float* row, int64_t K, int32_t zero) {
  typedef Byte Bytes __attribute__((vector_size(kLanes)));
  const auto part = [&](int64_t k) { return k + kLanes <= K ? load(row + k) : load_tail(row + k, K - k, 0.0f); };
  Ints most{};  // the bits of |x| order as |x| does, and infinity and NaN above
  for (int64_t k = 0; k < K; k += kLanes) {
    const Ints bits = (Ints)part(k) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t largest = 0;
  for (int i = 0; i < kLanes; i++) largest = std::max(largest, most[i]);
  float value;
  std::memcpy(&value, &largest, 4);
  const bool finite = largest < 0x7f800000;
  *scale = finite ? value / 127.0f : kNaN;
  const float inverse = finite && value > 1e-30f ? 127.0f / value : 0.0f;  // less would overflow
  for (int64_t k = 0; k < K; k += kLanes) {
    const Floats shifted = part(k) * inverse + 12582912.0f;  // 1.5 · 2^23: the low bits hold the nearest whole number
    const Bytes bytes = __builtin_convertvector((Ints)shifted - 0x4b400000 + zero, Bytes);
    if (k + kLanes <= K) std::memcpy(to + k, &bytes, sizeof bytes);
    else std::memcpy(to + k, &bytes, K - k);
  }
}

inline void write_row(uint8_t* to, float* scale, const float* row, int64_t K) { round_row(to, scale, row, K, 128); }

inline void write_row(int8_t* to, float* scale, const float* row, int64_t K) { round_row(to, scale, row, K, 0); }

// The same, with zeros up to the end of the last group of k.
template <class W>
void write_whole_row(const Acts& acts, int64_t m, const float* row, int64_t K) {
  typename W::Act* to = acts.row<W>(m);
  write_row(to, acts.scale + m, row, K);
  const int64_t end = up(K, W::kGroup);
  std::fill(to + K, to + end, typename W::Act{});
  if constexpr (std::is_same_v<W, Int4Weights>) {
    for (int64_t g = 0; g < end / W::kGroup; g++) {
      int32_t total = 0;
      for (int64_t k = 0; k < W::kGroup; k++) total += to[g * W::kGroup + k];
      std::memcpy(to + end + 4 * g, &total, 4);
    }
  }
}

// (row - mean) / sqrt(variance + epsilon) · w + b, (C,)
inline void normalise(float* to, const float* row, const float* w, const float* b, int64_t C, float epsilon) {
  Floats total{}, squares{};
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) total += load(row + c);
  float mean = sum(total);
  for (; c < C; c++) mean += row[c];
  mean /= float(C);
  for (c = 0; c + kLanes <= C; c += kLanes) {
    const Floats d = load(row + c) - mean;
    squares += d * d;
  }
  float variance = sum(squares);
  for (; c < C; c++) variance += (row[c] - mean) * (row[c] - mean);
  const float rstd = 1.0f / std::sqrt(variance / float(C) + epsilon);
  for (c = 0; c + kLanes <= C; c += kLanes) store(to + c, (load(row + c) - mean) * rstd * load(w + c) + load(b + c));
  for (; c < C; c++) to[c] = (row[c] - mean) * rstd * w[c] + b[c];
}

// Row m of the activations from fp32 (K,).
inline void write_row(const Acts& acts, Weights weights, int64_t m, const float* row, int64_t K) {
  switch (weights) {
    case Weights::f32: return write_whole_row<F32Weights>(acts, m, row, K);
    case Weights::bf16: return write_whole_row<Bf16Weights>(acts, m, row, K);
    case Weights::int8: return write_whole_row<Int8Weights>(acts, m, row, K);
    case Weights::int4: return write_whole_row<Int4Weights>(acts, m, row, K);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
