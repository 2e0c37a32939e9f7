// A vector of kLanes floats for the instruction set this file is compiled for, through GCC and Clang's vector
// extensions: one source, lowered to SSE2, AVX2 or AVX-512 (or another machine's vectors).
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "fastlm.h"

namespace fastlm::cpu::FASTLM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Storage types of the two halves; arithmetic is always in float.
struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

inline Floats broadcast(float value) { return value - Floats{}; }

// ---- one element

inline float to_float(float x) { return x; }

inline float to_float(Bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(Fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, body = x.bits & 0x7fff;
  uint32_t bits;
  if (body >= 0x7c00) {
    bits = 0x7f800000 | (body << 13);  // infinity, NaN
  } else {
    bits = (body << 13) + (112u << 23);
    if (body < 0x0400) {  // zero and subnormals: the value is body · 2^-24
      const float value = float(body) * 0x1p-24f;
      std::memcpy(&bits, &value, 4);
    }
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) { return x; }

template <>
inline Bf16 from_float<Bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
inline Fp16 from_float<Fp16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (bits < 0x38800000) {                                   // below the smallest normal
    float value;
    std::memcpy(&value, &bits, 4);
    return {uint16_t(sign | uint16_t(std::nearbyint(value * 0x1p24f)))};
  }
  bits -= 112u << 23;
  return {uint16_t(sign | ((bits + 0xfff + ((bits >> 13) & 1)) >> 13))};
}

// ---- kLanes elements

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

inline Floats load(const Fp16* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Floats x;
  for (int i = 0; i < kLanes; i++) x[i] = to_float(p[i]);
  return x;
#endif
}

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

inline void store(Bf16* p, Floats x) {
#if defined(__AVX512BF16__)
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);  // subnormal ones become 0
  std::memcpy(p, &narrow, sizeof narrow);
#else
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;
  const Words nan = (Words)(x != x);
  const Halves halves = __builtin_convertvector((rounded & ~nan) | (quiet & nan), Halves);
  std::memcpy(p, &halves, sizeof halves);
#endif
}

inline void store(Fp16* p, Floats x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; i++) p[i] = from_float<Fp16>(x[i]);
#endif
}

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

// Whether a lane of a comparison holds.
inline bool any(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#endif
  int32_t bits = 0;
  for (int i = 0; i < kLanes; i++) bits |= mask[i];
  return bits != 0;
}

inline Floats maximum(Floats a, Floats b) { return select(a > b, a, b); }

// Pairwise, so that the order is the same for the same kLanes.
inline float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);  // in the order below
#elif defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; i++) x[i] += x[i + width];
  return x[0];
}

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
