// AVX-512 F, BW, DQ and VL: sixteen lanes.
#pragma once

#include <immintrin.h>

#define FASTLM_LANES 16
#include "pairs.h"

namespace fastlm::cpu::FASTLM_ISA::machine {

struct avx512 : pairs<avx512> {
  using generic::store;

  static Floats load(const Fp16* p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

  static void store(Fp16* p, Floats x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
  }

  static bool any(Ints mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }

  static float sum(Floats x) { return _mm512_reduce_add_ps((__m512)x); }  // in the generic order

  static Floats square_root(Floats x) { return (Floats)_mm512_sqrt_ps((__m512)x); }

  static void stream(float* p, Floats x) { _mm512_stream_ps(p, (__m512)x); }

  using Byte = int8_t;
  static void add_bytes(Ints& sum, Ints w, const Byte* x) {  // |w| times x with w's sign
    const __m512i four = _mm512_set1_epi32(four_bytes(x)), zero = _mm512_setzero_si512();
    const __m512i turned = _mm512_mask_sub_epi8(four, _mm512_movepi8_mask((__m512i)w), zero, four);
    sum += fours(twos((Ints)_mm512_abs_epi8((__m512i)w), (Ints)turned));
  }

  static Shorts twos(Ints bytes, Ints signed_bytes) {
    return (Shorts)_mm512_maddubs_epi16((__m512i)bytes, (__m512i)signed_bytes);
  }
  static Ints fours(Shorts twos) { return (Ints)_mm512_madd_epi16((__m512i)twos, _mm512_set1_epi16(1)); }
};

}  // namespace fastlm::cpu::FASTLM_ISA::machine
