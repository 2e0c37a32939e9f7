// Attention of the newest tokens over a paged cache, on the CPU.
//
//   o[t] = sum_s softmax_s(scale q[t]·k[s]) v[s]   over the positions s ≤ lengths[b] - T + t
//
// A thread owns a head of a sequence and walks its pages once, kRun positions at a time: scores of all T queries,
// then the running maximum, sum and output of each. Keys and values are read once, straight from the pages.
#include <algorithm>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "running.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T>
void decode(const DecodeAttention& op, int threads) {
  int64_t longest = 1;
  for (int64_t b = 0; b < op.B; b++) longest = std::max(longest, int64_t(op.lengths[b]));
  for_each(op.B * op.H, 4 * op.T * op.D * longest, threads, [&](int64_t bh) {
    const int64_t b = bh / op.H, h = bh % op.H, length = op.lengths[b];
    const int64_t Dp = (op.D + kLanes - 1) / kLanes * kLanes;
    const T* q_head = static_cast<const T*>(op.q) + b * op.stride_qb + h * op.stride_qh;
    thread_local std::vector<float> scratch;
    scratch.assign(2 * op.T * Dp, 0.0f);
    float *q = scratch.data(), *o = q + op.T * Dp;  // (T, Dp) ×2
    for (int64_t t = 0; t < op.T; t++)
      for (int64_t d = 0; d < op.D; d++) q[t * Dp + d] = to_float(q_head[t * op.stride_qt + d]) * op.scale;
    thread_local std::vector<Running> states;
    states.assign(op.T, Running{});

    const auto rows = [&](const void* pages, int64_t stride_p, int64_t stride_s, int64_t stride_h, int64_t s) {
      const T* first = static_cast<const T*>(pages) + h * stride_h;
      if (s >= length) return Rows<T>{nullptr, stride_s};
      const int64_t page = op.block_table[b * op.stride_tb + s / op.page];
      return Rows<T>{first + page * stride_p + s % op.page * stride_s, stride_s};
    };
    for (int64_t s0 = 0; s0 < length;) {
      const int64_t run = std::min({kRun, op.page - s0 % op.page, length - s0});
      const Rows<T> k = rows(op.k_pages, op.stride_kp, op.stride_ks, op.stride_kh, s0);
      const Rows<T> v = rows(op.v_pages, op.stride_vp, op.stride_vs, op.stride_vh, s0);
      const Rows<T> next = rows(op.k_pages, op.stride_kp, op.stride_ks, op.stride_kh, s0 + run);
      for (int64_t t = 0; t < op.T; t++) {
        const int64_t seen = std::clamp(length - op.T + t + 1 - s0, int64_t(0), run);
        if (!seen) continue;
        float scores[kRun];
        score(scores, q + t * Dp, k, v, seen, op.D);
        take(states[t], o + t * Dp, scores, seen, v, next, op.D);
      }
      s0 += run;
    }
    for (int64_t t = 0; t < op.T; t++) {
      T* out = static_cast<T*>(op.o) + ((b * op.T + t) * op.H + h) * op.D;
      const float scale = states[t].l != 0.0f ? 1.0f / states[t].l : 0.0f;
      for (int64_t d = 0; d < op.D; d++) out[d] = from_float<T>(o[t * Dp + d] * scale);
    }
  });
}

}  // namespace

void decode_attention(const DecodeAttention& op, int threads) {
  switch (op.dtype) {
    case DType::f32: return decode<float>(op, threads);
    case DType::bf16: return decode<Bf16>(op, threads);
    case DType::f16: return decode<Fp16>(op, threads);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
