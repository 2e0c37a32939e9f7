// A vector of kLanes floats for the instruction set this file is compiled for, through GCC and Clang's vector
// extensions: one source, lowered to SSE2, AVX2 or AVX-512 (or another machine's vectors). What an instruction set
// offers beside that is in simd/<its name>.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "fastlm.h"

#define FASTLM_QUOTED(path) #path
#define FASTLM_FILE_OF(isa) FASTLM_QUOTED(simd/isa.h)
#include FASTLM_FILE_OF(FASTLM_ISA)

namespace fastlm::cpu::FASTLM_ISA {

using Machine = machine::FASTLM_ISA;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Floats load(const Bf16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

inline Floats load(const Fp16* p) { return Machine::load(p); }

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

inline void store(Bf16* p, Floats x) { Machine::store(p, x); }

inline void store(Fp16* p, Floats x) { Machine::store(p, x); }

// The first `count` < kLanes elements, the other lanes `fill`; nothing beyond them is touched.
template <class T>
inline Floats load_tail(const T* p, int64_t count, float fill) {
  Floats x = broadcast(fill);
  for (int64_t i = 0; i < count; i++) x[i] = to_float(p[i]);
  return x;
}

template <class T>
inline void store_tail(T* p, Floats x, int64_t count) {
  for (int64_t i = 0; i < count; i++) p[i] = from_float<T>(x[i]);
}

// ---- arithmetic

inline Floats select(Ints mask, Floats yes, Floats no) {
  return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask));
}

inline bool any(Ints mask) { return Machine::any(mask); }

inline Floats maximum(Floats a, Floats b) { return select(a > b, a, b); }

inline float sum(Floats x) { return Machine::sum(x); }

// A vector whose lane l is lane places[l] of a and b, one behind the other.
template <int... places>
inline Floats shuffle(Floats a, Floats b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, places...);
#else
  return __builtin_shuffle(a, b, Ints{places...});
#endif
}

// Lane l: sum(x[l]), in the order of `sum`. A level adds the halves of every piece; those of two vectors then alternate.
template <int piece, int... l>
inline Floats sums_of(const Floats* x, std::integer_sequence<int, l...> lanes) {
  if constexpr (piece == 1) {
    return x[0];
  } else {
    constexpr int half = piece / 2;
    Floats halved[half];
    for (int i = 0; i < half; i++) {
      halved[i] = shuffle<(l / half % 2 * kLanes + l / piece * piece + l % half)...>(x[i], x[i + half]) +
                  shuffle<(l / half % 2 * kLanes + l / piece * piece + l % half + half)...>(x[i], x[i + half]);
    }
    return sums_of<half>(halved, lanes);
  }
}

inline Floats sums_of(const Floats (&x)[kLanes]) {
  return sums_of<kLanes>(x, std::make_integer_sequence<int, kLanes>{});
}

// Pairs of vectors `distance` apart swap the lanes that lie `distance` off their diagonal; all distances together transpose.
template <int distance, int... l>
inline void transpose_step(Floats (&x)[kLanes], std::integer_sequence<int, l...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) {
    if (i & distance) continue;
    const Floats a = x[i], b = x[i + distance];
    x[i] = shuffle<(l & distance ? kLanes + l - distance : l)...>(a, b);
    x[i + distance] = shuffle<(l & distance ? kLanes + l : l + distance)...>(a, b);
  }
}

// Lane l of vector i becomes lane i of vector l.
inline void transpose(Floats (&x)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  transpose_step<1>(x, lanes);
  transpose_step<2>(x, lanes);
  if constexpr (kLanes > 4) transpose_step<4>(x, lanes);
  if constexpr (kLanes > 8) transpose_step<8>(x, lanes);
}

// A square of kLanes rows, `from_ld` apart, transposed to rows `to_ld` apart.
inline void transpose(float* to, int64_t to_ld, const float* from, int64_t from_ld) {
  Floats square[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) square[i] = load(from + i * from_ld);
  transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) store(to + i * to_ld, square[i]);
}

inline float maximum(Floats x) {
  float m = x[0];
  for (int i = 1; i < kLanes; i++) m = x[i] > m ? x[i] : m;
  return m;
}

// exp(x) within 2 ulp for x ≤ 88, 0 below -87.3 (no subnormal results); NaN gives NaN.
//
// exp(x) = 2^n exp(r), n = round(x log2 e), r = x - n ln 2 in two steps, exp(r) by a polynomial of degree 6 that is
// minimax on |r| ≤ ln 2 / 2 (coefficients as in Cephes' expf).
[[gnu::always_inline]] inline Floats exp(Floats x) {
  const Floats low = broadcast(-87.33654f);
  const Ints underflow = x < low;
  const Floats clamped = select(underflow, low, x);
  const Floats shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: the low bits hold round(x log2 e)
  const Floats n = shifted - 12582912.0f;
  const Floats r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Floats power = (Floats)(((Ints)shifted - (0x4b400000 - 127)) << 23);  // 2^n, or anything where x is NaN
  return select(underflow, Floats{}, p * power);
}

}  // namespace fastlm::cpu::FASTLM_ISA
