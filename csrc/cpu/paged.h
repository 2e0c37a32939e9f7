// The keys and values of a head of a sequence in a cache's pages: a new position goes in, a query attends to all.
#pragma once

#include "running.h"

namespace fastlm::cpu::FASTLM_ISA {

struct PagedHead {
  void *k, *v;           // of the head, in page 0
  const int32_t* pages;  // of the sequence
  int64_t page;          // positions of a page
  int64_t stride_p, stride_s;
  int64_t D;

  template <class T>
  T* at(void* first, int64_t s) const {
    return static_cast<T*>(first) + pages[s / page] * stride_p + s % page * stride_s;
  }
};

template <class T>
void append(const PagedHead& head, int64_t s, const float* k, const float* v) {
  const auto copy = [&](T* to, const float* from) {
    int64_t d = 0;
    for (; d + kLanes <= head.D; d += kLanes) store(to + d, load(from + d));
    for (; d < head.D; d++) to[d] = from_float<T>(from[d]);
  };
  copy(head.at<T>(head.k, s), k), copy(head.at<T>(head.v, s), v);
}

// o (D,) = softmax(q·k) v over the positions below `length`; q (Dp,), scaled, is 0 behind D, sums (Dp,) everywhere.
template <class T>
void attend(float* o, float* sums, const float* q, const PagedHead& head, int64_t length) {
  const auto rows = [&](void* first, int64_t s) {
    return Rows<T>{s < length ? head.at<T>(first, s) : nullptr, head.stride_s};
  };
  Running state;
  for (int64_t s0 = 0; s0 < length;) {
    const int64_t run = std::min({kRun, head.page - s0 % head.page, length - s0});
    const Rows<T> v = rows(head.v, s0);
    float scores[kRun];
    score(scores, q, rows(head.k, s0), v, run, head.D);
    take(state, sums, scores, run, v, rows(head.k, s0 + run), head.D);
    s0 += run;
  }
  for (int64_t d = 0; d < head.D; d++) o[d] = sums[d] / state.l;
}

// Both, for pages of a dtype.
struct PageKind {
  int64_t element;  // bytes
  void (*append)(const PagedHead&, int64_t, const float*, const float*);
  void (*attend)(float*, float*, const float*, const PagedHead&, int64_t);
};

inline PageKind page_kind(DType dtype) {
  switch (dtype) {
    case DType::bf16: return {2, append<Bf16>, attend<Bf16>};
    case DType::f16: return {2, append<Fp16>, attend<Fp16>};
    default: return {4, append<float>, attend<float>};
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
