// Products of a few rows with packed weights: y[m, n] = sum_k x[m, k] w[k, n], the weights read once for all rows.
//
// Packed weights are panels of kPanel outputs. A step down a panel is kPanel words of four bytes, a word an output: one
// fp32, two bf16, four int8 or eight int4 of neighbouring k. So a step is 64 bytes whatever the width, and a thread
// reads its panels from the first byte to the last.
//
//   f32    y = sum x w                                   x fp32
//   bf16   y = sum x w                                   x bf16 where the CPU multiplies pairs of it, fp32 otherwise
//   int8   y = s_x[m] s_w[n] sum x w                     x int8, a scale a row; for VNNI, which multiplies bytes by int8,
//                                                        as bytes x + 128, and 128 sum w is taken off at the end
//   int4   y = s_x[m] sum_g s_w[g, n] sum_{k in g} x w   x int8; w as 0 … 15, 8 sum x taken off. A group g of 64 k has
//                                                        its scales (kPanel fp32) before its eight steps; word j of a
//                                                        step holds k = 8 step + (0 … 3) in the low halves of its
//                                                        bytes, 8 step + (4 … 7) in the high ones
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

constexpr int64_t kPanel = 16;                    // outputs
constexpr int kParts = int(kPanel) / kLanes;      // vectors a panel is wide

// A group of k: as many as go together, in a panel of so many bytes.
struct F32Weights {
  static constexpr int64_t kGroup = 1, kGroupBytes = 64;
  using Act = float;
  using Sum = Floats;
  static void add(Sum& sum, Ints w, const Act* x) { sum += broadcast(*x) * (Floats)w; }
};

struct Bf16Weights {
  static constexpr int64_t kGroup = 2, kGroupBytes = 64;
  using Sum = Floats;
#if defined(__AVX512BF16__)
  using Act = Bf16;
  static void add(Sum& sum, Ints w, const Act* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w);
  }
#else
  using Act = float;
  static void add(Sum& sum, Ints w, const Act* x) {
    sum += broadcast(x[0]) * (Floats)((Words)w << 16);
    sum += broadcast(x[1]) * (Floats)((Words)w & 0xffff0000u);
  }
#endif
};

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));

// The products of 4 · kLanes pairs of bytes, unsigned by signed, in twos, which must stay below 2^15.
inline Shorts twos(Ints bytes, Ints signed_bytes) {
#if defined(__AVX512F__)
  return (Shorts)_mm512_maddubs_epi16((__m512i)bytes, (__m512i)signed_bytes);
#else
  return (Shorts)_mm256_maddubs_epi16((__m256i)bytes, (__m256i)signed_bytes);
#endif
}

// Neighbours added.
inline Ints fours(Shorts twos) {
#if defined(__AVX512F__)
  return (Ints)_mm512_madd_epi16((__m512i)twos, _mm512_set1_epi16(1));
#else
  return (Ints)_mm256_madd_epi16((__m256i)twos, _mm256_set1_epi16(1));
#endif
}
#endif

inline int32_t four_bytes(const void* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return four;
}

struct Int8Weights {
  static constexpr int64_t kGroup = 4, kGroupBytes = 64;
  using Sum = Ints;
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  using Act = int8_t;
  static void add(Sum& sum, Ints w, const Act* x) {  // |w| times x with w's sign
#if defined(__AVX512F__)
    const __m512i four = _mm512_set1_epi32(four_bytes(x)), zero = _mm512_setzero_si512();
    const __m512i turned = _mm512_mask_sub_epi8(four, _mm512_movepi8_mask((__m512i)w), zero, four);
    sum += fours(twos((Ints)_mm512_abs_epi8((__m512i)w), (Ints)turned));
#else
    const __m256i turned = _mm256_sign_epi8(_mm256_set1_epi32(four_bytes(x)), (__m256i)w);
    sum += fours(twos((Ints)_mm256_abs_epi8((__m256i)w), (Ints)turned));
#endif
  }
#else
  using Act = uint8_t;  // x + 128
  static void add(Sum& sum, Ints w, const Act* x) {
#if defined(__AVX512VNNI__)
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four_bytes(x)), (__m512i)w);
#else
    sum += (w << 24 >> 24) * int32_t(x[0]);
    sum += (w << 16 >> 24) * int32_t(x[1]);
    sum += (w << 8 >> 24) * int32_t(x[2]);
    sum += (w >> 24) * int32_t(x[3]);
#endif
  }
#endif
};

struct Int4Weights {
  static constexpr int64_t kGroup = 64, kGroupBytes = 9 * 64;
  using Act = int8_t;  // a row ends with the sums of its groups, int32
  using Sum = Floats;
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  // 16 bits hold the products of four steps: 16 · 15 · 127 < 2^15.
  static constexpr int kSteps = 4;
  using Part = Shorts;
  static Ints whole(Part part) { return fours(part); }
#else
  static constexpr int kSteps = 8;
  using Part = Ints;
  static Ints whole(Part part) { return part; }
#endif
  static void add(Part& sum, Ints w, const Act* x) {
#if defined(__AVX2__)
    const Ints low = w & 0x0f0f0f0f, high = (Ints)((Words)w >> 4) & 0x0f0f0f0f;
#endif
#if defined(__AVX512VNNI__)
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)low, _mm512_set1_epi32(four_bytes(x)));
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)high, _mm512_set1_epi32(four_bytes(x + 4)));
#elif defined(__AVX2__)
    sum += twos(low, Ints{} + four_bytes(x));
    sum += twos(high, Ints{} + four_bytes(x + 4));
#else
    for (int i = 0; i < 4; i++) {
      sum += (w >> (8 * i) & 15) * int32_t(x[i]);
      sum += (w >> (8 * i + 4) & 15) * int32_t(x[4 + i]);
    }
#endif
  }
};

// How far ahead of a step the weights are fetched into the second-level cache, in bytes, where rows are few.
constexpr int64_t kAhead = 2048;

// sums[m][p] (kParts vectors each) = rows x[m] (K,) times `panels` neighbouring panels of `bytes` each; K is a multiple
// of the group. The weights of what comes next are fetched ahead: of the next panels' same step where many rows make
// a step long, a little further down the same panels otherwise, and towards the end the beginning of the next ones.
template <class W, int rows, int panels, bool fetch>
inline void product_of_panels(typename W::Sum (&sums)[rows][panels * kParts], const char* w, int64_t bytes,
                              const typename W::Act* x, int64_t ldx) {
#pragma GCC unroll 16
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
    for (int p = 0; p < panels * kParts; p++) sums[m][p] = typename W::Sum{};
  if constexpr (std::is_same_v<W, Int4Weights>) {
    const int32_t* x_sums = reinterpret_cast<const int32_t*>(x + bytes / W::kGroupBytes * W::kGroup);
    const int64_t ahead = rows >= 4 ? panels * bytes : kAhead;
    for (int64_t g = 0, at = 0; at < bytes; g++) {
      Floats scales[panels * kParts];
      Ints exact[rows][panels * kParts];
      const auto fetch_step = [&](int p) {
        if constexpr (fetch) __builtin_prefetch(w + p * bytes + at + ahead, 0, 2);
      };
#pragma GCC unroll 16
      for (int p = 0; p < panels; p++) {
        fetch_step(p);
#pragma GCC unroll 16
        for (int i = 0; i < kParts; i++)
          scales[p * kParts + i] = load(reinterpret_cast<const float*>(w + p * bytes + at) + kLanes * i);
      }
#pragma GCC unroll 16
      for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
        for (int p = 0; p < panels * kParts; p++) exact[m][p] = Ints{};
      at += 4 * kPanel;
      for (int first = 0; first < 8; first += W::kSteps) {
        typename W::Part parts[rows][panels * kParts];
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
          for (int p = 0; p < panels * kParts; p++) parts[m][p] = typename W::Part{};
#pragma GCC unroll 1  // or else all products are kept, to be added up in another order
        for (int step = first; step < first + W::kSteps; step++, at += 4 * kPanel) {
          const typename W::Act* x_at = x + g * W::kGroup + step * 8;
#pragma GCC unroll 16
          for (int p = 0; p < panels; p++) {
            fetch_step(p);
            Ints words[kParts];
#pragma GCC unroll 16
            for (int i = 0; i < kParts; i++) std::memcpy(&words[i], w + p * bytes + at + 4 * kLanes * i, sizeof(Ints));
#pragma GCC unroll 16
            for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
              for (int i = 0; i < kParts; i++) W::add(parts[m][p * kParts + i], words[i], x_at + m * ldx);
          }
        }
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
          for (int p = 0; p < panels * kParts; p++) exact[m][p] += W::whole(parts[m][p]);
      }
#pragma GCC unroll 16
      for (int m = 0; m < rows; m++) {
        int32_t x_sum;
        std::memcpy(&x_sum, reinterpret_cast<const char*>(x_sums + g) + m * ldx, 4);
#pragma GCC unroll 16
        for (int p = 0; p < panels * kParts; p++)
          sums[m][p] += __builtin_convertvector(exact[m][p] - 8 * x_sum, Floats) * scales[p];
      }
    }
  } else {
    const auto steps = [&](int64_t from, int64_t to, int64_t ahead) {
      for (int64_t at = from; at < to; at += 4 * kPanel) {
        Ints words[panels * kParts];  // a step
#pragma GCC unroll 16
        for (int p = 0; p < panels; p++) {
          if constexpr (fetch) __builtin_prefetch(w + p * bytes + at + ahead, 0, 2);
#pragma GCC unroll 16
          for (int i = 0; i < kParts; i++)
            std::memcpy(&words[p * kParts + i], w + p * bytes + at + 4 * kLanes * i, sizeof(Ints));
        }
        const typename W::Act* x_at = x + at / (4 * kPanel) * W::kGroup;
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
          for (int p = 0; p < panels * kParts; p++) W::add(sums[m][p], words[p], x_at + m * ldx);
      }
    };
    if constexpr (rows >= 4) {
      steps(0, bytes, panels * bytes);
    } else {
      const int64_t turn = std::max(bytes - kAhead, int64_t(0));
      steps(0, turn, kAhead);
      steps(turn, bytes, kAhead + (panels - 1) * bytes);
    }
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
