// What AVX2 and AVX-512 without VNNI have in common: bytes are multiplied in pairs, and stores may go past the caches.
#pragma once

#include "generic.h"

namespace fastlm::cpu::FASTLM_ISA::machine {

// Own has twos, the products of pairs of bytes, unsigned by signed, in sums of two that must stay below 2^15, and fours,
// neighbours of those added.
template <class Own>
struct pairs : generic {
  static constexpr int64_t kStreamFrom = 16384;
  static void stream_end() { _mm_sfence(); }

  // 16 bits hold the products of four steps: 16 · 15 · 127 < 2^15.
  using Nibbles = Shorts;
  static constexpr int kNibbleSteps = 4;
  static void add_nibbles(Nibbles& sum, Ints w, const int8_t* x) {
    sum += Own::twos(w & 0x0f0f0f0f, Ints{} + four_bytes(x));
    sum += Own::twos((Ints)((Words)w >> 4) & 0x0f0f0f0f, Ints{} + four_bytes(x + 4));
  }
  static Ints whole(Nibbles sum) { return Own::fours(sum); }
};

}  // namespace fastlm::cpu::FASTLM_ISA::machine
