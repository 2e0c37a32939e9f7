// Tiles of products with packed weights (packed.h): what f32.cpp, bf16.cpp, int8.cpp and int4.cpp have in common.
//
// W says how a step is multiplied:
//   Act, Sum                       an activation, and what the products add up to
//   kGroup, kGroupBytes            the k that go together, and their bytes in a panel
//   add(sum, w, x)                 sum += a vector of words times the group's activations at x
//   finish(packed, acts, m, n, s)  the values of row m from output n on, before the bias
//   write(to, scale, row, K)       a row of activations from fp32, and its scale
//   product(…), write_sums(…)      where it has them: its own loop over K; what lies behind a row of activations
#pragma once

#include <algorithm>

#include "packed.h"

namespace fastlm::cpu::FASTLM_ISA {

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

// Rows m0 … of the product with `panels` panels from p0 on.
template <class W, int rows, int panels, bool fetch = true>
void tile(const Packed& packed, const Acts& acts, int64_t m0, int64_t p0, const Output& out) {
  const int64_t bytes = up(packed.K, W::kGroup) / W::kGroup * W::kGroupBytes;  // a panel
  const int64_t ld = acts.ld / int64_t(sizeof(typename W::Act));
  const char* w = packed.w + p0 * bytes;
  const typename W::Act* x = acts.row<typename W::Act>(m0);
  typename W::Sum sums[rows][panels * kParts];
  if constexpr (requires { W::template product<rows, panels, fetch>(sums, w, bytes, x, ld); }) {
    W::template product<rows, panels, fetch>(sums, w, bytes, x, ld);
  } else {
    product_of_panels<W, rows, panels, fetch>(sums, w, bytes, x, ld);
  }
  for (int m = 0; m < rows; m++)
    for (int v = 0; v < panels * kParts; v++) {
      const int64_t n = p0 * kPanel + v * kLanes;
      const Floats y = W::finish(packed, acts, m0 + m, n, sums[m][v]);
      out.take(m0 + m, n, packed.bias ? y + load(packed.bias + n) : y);
    }
}

// Rows m … M with `panels` panels; what was read once stays in the caches for the next rows.
template <class W, int panels>
void tiles(const Packed& packed, const Acts& acts, int64_t m, int64_t M, int64_t p0, const Output& out) {
  if constexpr (panels <= kPanelsOfMany) {
    if (m + kManyRows <= M) tile<W, kManyRows, panels>(packed, acts, m, p0, out), m += kManyRows;
    for (; m + kManyRows <= M; m += kManyRows) tile<W, kManyRows, panels, false>(packed, acts, m, p0, out);
    if (m + 4 <= M) tile<W, 4, panels>(packed, acts, m, p0, out), m += 4;
    if (m + 2 <= M) tile<W, 2, panels>(packed, acts, m, p0, out), m += 2;
    if (m < M) tile<W, 1, panels>(packed, acts, m, p0, out);
  } else if (M == 1) {
    tile<W, 1, panels>(packed, acts, 0, p0, out);
  } else {
    tile<W, 2, panels>(packed, acts, 0, p0, out);
    if (M == 3) tile<W, 1, panels, false>(packed, acts, 2, p0, out);
  }
}

template <class W>
void multiply(const Packed& packed, const Acts& acts, const Area& area, const Output& out) {
  const auto [m, M, first, end, most] = area;
  for (int64_t p = first; p < end;) {
    const int64_t left = std::min(end - p, most);
    if (left >= 8) tiles<W, 8>(packed, acts, m, M, p, out), p += 8;
    else if (left >= 4) tiles<W, 4>(packed, acts, m, M, p, out), p += 4;
    else if (left >= 2) tiles<W, 2>(packed, acts, m, M, p, out), p += 2;
    else tiles<W, 1>(packed, acts, m, M, p, out), p += 1;
  }
}

// A row of activations, with zeros up to the end of the last group of k.
template <class W>
void write_row(const Acts& acts, int64_t m, const float* row, int64_t K) {
  typename W::Act* to = acts.row<typename W::Act>(m);
  const int64_t end = up(K, W::kGroup);
  W::write(to, acts.scale + m, row, K);
  std::fill(to + K, to + end, typename W::Act{});
  if constexpr (requires { W::write_sums(to, end); }) W::write_sums(to, end);
}

}  // namespace fastlm::cpu::FASTLM_ISA
