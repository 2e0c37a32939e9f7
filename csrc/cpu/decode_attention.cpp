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
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kRun = 64;

// The running softmax of one query over runs of keys.
struct Running {
  float m = -kInfinity, l = 0.0f;
};

template <class T>
inline Floats load_up_to(const T* p, int64_t d, int64_t D) {
  return d + kLanes <= D ? load(p + d) : load_tail(p + d, D - d, 0.0f);
}

template <class T>
inline float dot(const float* q, const T* k, int64_t D) {
  Floats total{};
  for (int64_t d = 0; d < D; d += kLanes) total += load(q + d) * load_up_to(k, d, D);
  return sum(total);
}

// Takes `seen` ≤ kRun scores and their values v (rows stride apart) into the softmax and its output o (Dp,).
template <class T>
void take(Running& state, float* o, float* scores, int64_t seen, const T* v, int64_t stride, int64_t D) {
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
  for (int64_t d = 0; d < D; d += kLanes) {
    Floats out = load(o + d) * shrink;
    for (int64_t j = 0; j < seen; j++) out += scores[j] * load_up_to(v + j * stride, d, D);
    store(o + d, out);
  }
}

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

    for (int64_t s0 = 0; s0 < length;) {
      const int64_t slot = s0 % op.page, run = std::min({kRun, op.page - slot, length - s0});
      const int64_t page = op.block_table[b * op.stride_tb + s0 / op.page];
      const T* k = static_cast<const T*>(op.k_pages) + page * op.stride_kp + slot * op.stride_ks + h * op.stride_kh;
      const T* v = static_cast<const T*>(op.v_pages) + page * op.stride_vp + slot * op.stride_vs + h * op.stride_vh;
      for (int64_t t = 0; t < op.T; t++) {
        const int64_t seen = std::clamp(length - op.T + t + 1 - s0, int64_t(0), run);
        if (!seen) continue;
        float scores[kRun];
        for (int64_t j = 0; j < seen; j++) scores[j] = dot(q + t * Dp, k + j * op.stride_ks, op.D);
        take(states[t], o + t * Dp, scores, seen, v, op.stride_vs, op.D);
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
