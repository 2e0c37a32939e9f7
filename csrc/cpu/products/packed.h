// Products of a few rows with packed weights: y[m, n] = sum_k x[m, k] w[k, n], the weights read once for all rows.
//
// Packed weights are panels of kPanel outputs. A step down a panel is kPanel words of four bytes, a word an output: one
// fp32, two bf16, four int8 or eight int4 of neighbouring k. So a step is 64 bytes whatever the width, and a thread reads
// its panels from the first byte to the last. What a kind of weights multiplies with, and how, is said in f32.cpp, bf16.cpp,
// int8.cpp and int4.cpp; how a product is cut among threads in cut.h.
#pragma once

#include "../gelu.h"
#include "../simd.h"

namespace fastlm::cpu::FASTLM_ISA {

constexpr int kParts = int(kPanel) / kLanes;  // vectors a panel is wide

inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows of activations as the weights take them: (rows, ld bytes), with a scale a row for int8 and int4.
struct Acts {
  char* x;
  float* scale;
  int64_t ld;

  template <class Act>
  Act* row(int64_t m) const { return reinterpret_cast<Act*>(x + m * ld); }
};

// A packed matrix (K, N) with its bias; scales and sums are those of int8.
struct Packed {
  const char* w;        // panels
  const float* bias;    // (up(N, kPanel),), or null
  const float* scale;   // (up(N, kPanel),), or null
  const int32_t* sums;  // (up(N, kPanel),), sum over k of w
  int64_t K, N;

  int64_t panels() const { return (N + kPanel - 1) / kPanel; }
};

// What becomes of a product's values: out = y, out += y, out = gelu(y).
enum class Then { store, add, gelu };

struct Output {
  float* rows;  // (M, ld), N rounded up to two panels wide
  int64_t ld;
  Then then;

  void take(int64_t m, int64_t n, Floats y) const {
    float* to = rows + m * ld + n;
    store(to, then == Then::add ? load(to) + y : then == Then::gelu ? gelu(y) : y);
  }
};

// Rows m … end_m of a product with the panels p … end_p, at most `most` of them side by side; with more than
// kPanelsOfMany side by side the rows are 0 … 1, 2 or 3.
struct Area {
  int64_t m, end_m, p, end_p, most;
};

// Rows and panels of the tiles of many rows: their sums fill the vector registers.
constexpr int kManyRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 2;
constexpr int kPanelsOfMany = kLanes == 16 ? 2 : 1;

// What a kind of weights does, each in its own file.
struct Kind {
  int64_t act_bytes;  // of an activation
  int64_t sum_bytes;  // behind a row of activations, for each kWeightGroup of k
  void (*write_row)(const Acts& acts, int64_t m, const float* row, int64_t K);  // row m of the activations, from (K,)
  void (*multiply)(const Packed& packed, const Acts& acts, const Area& area, const Output& out);

  // The bytes from one row of K to the next: lines of a cache, an odd number: rows a power of two apart collide there.
  int64_t row_stride(int64_t K) const {
    const int64_t whole = up(K, kWeightGroup);
    return (up(act_bytes * whole + whole / kWeightGroup * sum_bytes, 64) / 64 | 1) * 64;
  }
};

extern const Kind kF32, kBf16, kInt8, kInt4;

inline const Kind& kind_of(Weights weights) {
  switch (weights) {
    case Weights::f32: return kF32;
    case Weights::bf16: return kBf16;
    case Weights::int8: return kInt8;
    default: return kInt4;
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
