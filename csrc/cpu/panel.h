// Products of a few rows with packed weights: y[m, n] = sum_k x[m, k] w[k, n], the weights read once for all rows.
//
// Packed weights are panels of kPanel outputs. In a panel each run of `group` neighbouring k is kPanel words of four
// bytes, a word an output: one fp32, two bf16 or four int8. So a step down a panel is 64 bytes whatever the width, and
// a thread reads its panels from the first byte to the last.
//
//   f32    y = sum x w                       x fp32
//   bf16   y = sum x w                       x bf16 where the CPU multiplies pairs of it, fp32 otherwise
//   int8   y = s_x[m] s_w[n] sum x w         x int8, by row; as bytes x + 128 where the CPU multiplies bytes by int8
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

constexpr int64_t kPanel = 16;                    // outputs
constexpr int kParts = int(kPanel) / kLanes;      // vectors a panel is wide

struct F32Weights {
  static constexpr int64_t kGroup = 1;
  using Act = float;
  using Sum = Floats;
  static Act act(float x) { return x; }
  static void add(Sum& sum, Ints w, const Act* x) { sum += broadcast(*x) * (Floats)w; }
};

struct Bf16Weights {
  static constexpr int64_t kGroup = 2;
  using Sum = Floats;
#if defined(__AVX512BF16__)
  using Act = Bf16;
  static Act act(float x) { return from_float<Bf16>(x); }
  static void add(Sum& sum, Ints w, const Act* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w);
  }
#else
  using Act = float;
  static Act act(float x) { return x; }
  static void add(Sum& sum, Ints w, const Act* x) {
    sum += broadcast(x[0]) * (Floats)((Words)w << 16);
    sum += broadcast(x[1]) * (Floats)((Words)w & 0xffff0000u);
  }
#endif
};

struct Int8Weights {
  static constexpr int64_t kGroup = 4;
  using Act = uint8_t;  // x + 128
  using Sum = Ints;
#if defined(__AVX512VNNI__)
  static void add(Sum& sum, Ints w, const Act* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), (__m512i)w);
  }
#else
  static void add(Sum& sum, Ints w, const Act* x) {
    sum += (w << 24 >> 24) * int32_t(x[0]);
    sum += (w << 16 >> 24) * int32_t(x[1]);
    sum += (w << 8 >> 24) * int32_t(x[2]);
    sum += (w >> 24) * int32_t(x[3]);
  }
#endif
};

// sums[m][p] (kParts vectors each) = rows x[m] (K,) times panels p, each panel_bytes long; K a multiple of the group.
template <class W, int rows, int panels>
inline void product_of_panels(typename W::Sum (&sums)[rows][panels * kParts], const char* w, int64_t panel_bytes,
                              const typename W::Act* x, int64_t ldx, int64_t K) {
#pragma GCC unroll 16
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
    for (int p = 0; p < panels * kParts; p++) sums[m][p] = typename W::Sum{};
  for (int64_t k = 0; k < K; k += W::kGroup, w += 4 * kPanel) {
    Ints words[panels * kParts];
#pragma GCC unroll 16
    for (int p = 0; p < panels; p++) {
#if defined(__SSE2__)
      __builtin_prefetch(w + p * panel_bytes + 1536);
#endif
#pragma GCC unroll 16
      for (int i = 0; i < kParts; i++)
        std::memcpy(&words[p * kParts + i], w + p * panel_bytes + 4 * kLanes * i, sizeof(Ints));
    }
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
      for (int p = 0; p < panels * kParts; p++) W::add(sums[m][p], words[p], x + m * ldx + k);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
