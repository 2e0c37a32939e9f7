// The softmax of one query over runs of keys, a run at a time: scores, then maximum, sum and output carried on.
#pragma once

#include <algorithm>

#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

constexpr int64_t kRun = 64;

// The running softmax of one query over runs of keys.
struct Running {
  float m = -kInfinity, l = 0.0f;
};

template <class T>
inline Floats load_up_to(const T* p, int64_t d, int64_t D) {
  return d + kLanes <= D ? load(p + d) : load_tail(p + d, D - d, 0.0f);
}

// Rows of keys or values, `stride` apart; `first` is null where there are none.
template <class T>
struct Rows {
  const T* first;
  int64_t stride;

  const T* operator[](int64_t j) const { return first + j * stride; }
};

// Starts to read a row that is needed soon.
template <class T>
inline void fetch(const T* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

// scores[j] = q·k[j] for `seen` ≤ kRun keys; meanwhile their values are fetched.
template <class T>
void score(float* scores, const float* q, Rows<T> k, Rows<T> v, int64_t seen, int64_t D) {
  for (int64_t j = 0; j < seen; j += kLanes) {
    Floats products[kLanes];
    for (int i = 0; i < kLanes; i++) {
      const int64_t at = std::min(j + i, seen - 1);  // the last one again in place of what is not there
      fetch(v[at], D);
      products[i] = Floats{};
      for (int64_t d = 0; d < D; d += kLanes) products[i] += load(q + d) * load_up_to(k[at], d, D);
    }
    const Floats sums = sums_of(products);
    if (j + kLanes <= seen) store(scores + j, sums);
    else store_tail(scores + j, sums, seen - j);
  }
}

// Takes `seen` ≤ kRun scores and their values into the softmax and its output o (Dp,); meanwhile as many of the keys
// that come next are fetched.
template <class T>
void take(Running& state, float* o, float* scores, int64_t seen, Rows<T> v, Rows<T> next, int64_t D) {
  float m = state.m;
  for (int64_t j = 0; j < seen; j++) m = scores[j] > m || scores[j] != scores[j] ? scores[j] : m;
  const float shrink = state.m == -kInfinity ? 0.0f : exp(broadcast(state.m - m))[0];
  const int64_t padded = (seen + kLanes - 1) / kLanes * kLanes;
  for (int64_t j = seen; j < padded; j++) scores[j] = -kInfinity;
  Floats total{};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Floats p = m == -kInfinity ? Floats{} : exp(load(scores + j) - m);
    total += p;
    store(scores + j, p);
  }
  state.m = m;
  state.l = state.l * shrink + sum(total);
  int64_t d = 0;
  for (; d + 4 * kLanes <= D; d += 4 * kLanes) {  // four sums at a time: one would wait for its own addition
    Floats out[4];
    for (int i = 0; i < 4; i++) out[i] = load(o + d + i * kLanes) * shrink;
    for (int64_t j = 0; j < seen; j++) {
      if (next.first) fetch(next[j] + d, 4 * kLanes);
      for (int i = 0; i < 4; i++) out[i] += scores[j] * load(v[j] + d + i * kLanes);
    }
    for (int i = 0; i < 4; i++) store(o + d + i * kLanes, out[i]);
  }
  for (; d < D; d += kLanes) {
    Floats out = load(o + d) * shrink;
    for (int64_t j = 0; j < seen; j++) out += scores[j] * load_up_to(v[j], d, D);
    store(o + d, out);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
