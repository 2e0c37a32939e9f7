// What every instruction set offers the kernels, in its own file as a struct of its own name; here in plain C++. One that
// is wider comes after it, includes this file, and hides what it does better. Vectors have FASTLM_LANES floats, which
// every set but this one defines.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../halves.h"

#ifndef FASTLM_LANES
#define FASTLM_LANES 4
#endif

namespace fastlm::cpu::FASTLM_ISA {

constexpr int kLanes = FASTLM_LANES;  // floats of a vector; those of 16 have 32 registers, the others 16 at least

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));

inline Floats broadcast(float value) { return value - Floats{}; }

inline int32_t four_bytes(const void* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return four;
}

namespace machine {

struct generic {
  static Floats load(const Fp16* p) {
    Floats x;
    for (int i = 0; i < kLanes; i++) x[i] = to_float(p[i]);
    return x;
  }

  static void store(Fp16* p, Floats x) {
    for (int i = 0; i < kLanes; i++) p[i] = from_float<Fp16>(x[i]);
  }

  static void store(Bf16* p, Floats x) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words quiet = (bits >> 16) | 0x40;
    const Words nan = (Words)(x != x);
    const Halves halves = __builtin_convertvector((rounded & ~nan) | (quiet & nan), Halves);
    std::memcpy(p, &halves, sizeof halves);
  }

  // Whether a lane of a comparison holds.
  static bool any(Ints mask) {
    int32_t bits = 0;
    for (int i = 0; i < kLanes; i++) bits |= mask[i];
    return bits != 0;
  }

  // Pairwise, so that the order is the same for the same kLanes.
  static float sum(Floats x) {
    for (int width = kLanes / 2; width; width /= 2)
      for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
  }

  static Floats square_root(Floats x) {
    for (int i = 0; i < kLanes; i++) x[i] = std::sqrt(x[i]);
    return x;
  }

  // Stores past the caches, for rows of so many elements or more.
  static constexpr int64_t kStreamFrom = std::numeric_limits<int64_t>::max();
  static void stream(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
  static void stream_end() {}

  // sum += the products of two bf16 weights a lane with two of x, which is of the type Pair.
  using Pair = float;
  static void add_pairs(Floats& sum, Ints w, const float* x) {
    sum += broadcast(x[0]) * (Floats)((Words)w << 16);
    sum += broadcast(x[1]) * (Floats)((Words)w & 0xffff0000u);
  }

  // sum += the products of four int8 weights a lane with four bytes of x: int8, or uint8 for x + 128.
  using Byte = uint8_t;
  static void add_bytes(Ints& sum, Ints w, const Byte* x) {
    sum += (w << 24 >> 24) * int32_t(x[0]);
    sum += (w << 16 >> 24) * int32_t(x[1]);
    sum += (w << 8 >> 24) * int32_t(x[2]);
    sum += (w >> 24) * int32_t(x[3]);
  }

  // sum += the products of eight weights of 0 … 15 a lane with eight int8 of x. After so many steps it must be made whole.
  using Nibbles = Ints;
  static constexpr int kNibbleSteps = 8;
  static void add_nibbles(Nibbles& sum, Ints w, const int8_t* x) {
    for (int i = 0; i < 4; i++) {
      sum += (w >> (8 * i) & 15) * int32_t(x[i]);
      sum += (w >> (8 * i + 4) & 15) * int32_t(x[4 + i]);
    }
  }
  static Ints whole(Nibbles sum) { return sum; }
};

}  // namespace machine
}  // namespace fastlm::cpu::FASTLM_ISA
