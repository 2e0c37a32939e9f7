// Rows of fp32 rounded to bytes, for int8 and int4 weights.
#pragma once

#include <algorithm>

#include "../simd.h"

namespace fastlm::cpu::FASTLM_ISA {

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

}  // namespace fastlm::cpu::FASTLM_ISA
