// AVX2 with FMA and F16C: eight lanes.
#pragma once

#include <immintrin.h>

#define FASTLM_LANES 8
#include "pairs.h"

namespace fastlm::cpu::FASTLM_ISA::machine {

struct avx2 : pairs<avx2> {
  using generic::store;

  static Floats load(const Fp16* p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

  static void store(Fp16* p, Floats x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
  }

  static bool any(Ints mask) { return _mm256_movemask_ps((__m256)mask) != 0; }

  static float sum(Floats x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static Floats square_root(Floats x) { return (Floats)_mm256_sqrt_ps((__m256)x); }

  static void stream(float* p, Floats x) { _mm256_stream_ps(p, (__m256)x); }

  using Byte = int8_t;
  static void add_bytes(Ints& sum, Ints w, const Byte* x) {  // |w| times x with w's sign
    const __m256i turned = _mm256_sign_epi8(_mm256_set1_epi32(four_bytes(x)), (__m256i)w);
    sum += fours(twos((Ints)_mm256_abs_epi8((__m256i)w), (Ints)turned));
  }

  static Shorts twos(Ints bytes, Ints signed_bytes) {
    return (Shorts)_mm256_maddubs_epi16((__m256i)bytes, (__m256i)signed_bytes);
  }
  static Ints fours(Shorts twos) { return (Ints)_mm256_madd_epi16((__m256i)twos, _mm256_set1_epi16(1)); }
};

}  // namespace fastlm::cpu::FASTLM_ISA::machine
