// AVX-512 with BF16 and VNNI: products of pairs of bf16, and of fours of bytes, in one instruction.
#pragma once

#include "avx512.h"

namespace fastlm::cpu::FASTLM_ISA::machine {

struct avx512bf16 : avx512 {
  using avx512::store;

  static void store(Bf16* p, Floats x) {
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);  // subnormal ones become 0
    std::memcpy(p, &narrow, sizeof narrow);
  }

  using Pair = Bf16;
  static void add_pairs(Floats& sum, Ints w, const Bf16* x) {
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(four_bytes(x)), (__m512bh)w);
  }

  using Byte = uint8_t;  // x + 128: the instruction takes unsigned by signed
  static void add_bytes(Ints& sum, Ints w, const Byte* x) {
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four_bytes(x)), (__m512i)w);
  }

  using Nibbles = Ints;
  static constexpr int kNibbleSteps = 8;
  static void add_nibbles(Nibbles& sum, Ints w, const int8_t* x) {
    const Ints low = w & 0x0f0f0f0f, high = (Ints)((Words)w >> 4) & 0x0f0f0f0f;
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)low, _mm512_set1_epi32(four_bytes(x)));
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)high, _mm512_set1_epi32(four_bytes(x + 4)));
  }
  static Ints whole(Nibbles sum) { return sum; }
};

}  // namespace fastlm::cpu::FASTLM_ISA::machine
