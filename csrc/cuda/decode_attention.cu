// Attention of the newest tokens of each sequence over its paged cache, on the GPU.
//
//   x[t, s] = scale q[t]·k[s],  s <= lengths[b] - T + t;   o[t] = sum_s softmax_s(x)[t, s] v[s]
//
// Position s of sequence b lies in page block_table[b, s / page], row s % page. The positions are cut into splits of
// kDecodeSplit, one block each, whatever the batch: a block writes its maximum m, sum l and unnormalised o, and a second
// kernel merges a sequence's splits in ascending order. So a sequence's bits depend on nothing but itself, and lengths
// are read on the device: a split beyond its sequence ends at once. kLanes lanes share a key, 16 bytes of it each, and
// every lane has kAhead keys and values on the way before it computes. Source: Dao et al., "Flash-Decoding", 2023.
#include <cstring>

#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kAhead = 4;

// Where a split's m, l and o lie in the scratch: (B, H, T, splits, D + 2), o last.
struct Partial {
  float *m, *l, *o;
  __device__ Partial(float* scratch, int64_t D, int64_t row) : m(scratch + row * (D + 2)), l(m + 1), o(m + 2) {}
};

// 16 bytes as they were loaded: as elements they would be taken apart, and waited for, where paths meet.
using Part = Vector<uint32_t>;

template <class T>
__device__ Vector<T> elements(const Part& part) {
  Vector<T> of;
  memcpy(&of, &part, sizeof of);
  return of;
}

// kSize elements from d on of a row of D; zeros beyond. `kWide`: by one load.
template <bool kWide, class T>
__device__ Part load_part(const T* row, int64_t d, int64_t D) {
  Part part = {};
  if constexpr (kWide) {
    if (d < D) part = *reinterpret_cast<const Part*>(row + d);
  } else {
    Vector<T> of = elements<T>(part);
    for (int j = 0; j < Vector<T>::kSize; j++) of.at[j] = d + j < D ? row[d + j] : of.at[j];
    memcpy(&part, &of, sizeof part);
  }
  return part;
}

template <class T, int kLanes, int kQueries, bool kWide>
__global__ void __launch_bounds__(kThreads) _decode_attention_split_kernel(DecodeAttention op, int64_t splits) {
  constexpr int kSize = Vector<T>::kSize, kGroups = 32 / kLanes, kKeys = kWarps * kGroups;
  FASTLM_SHARED(OnlineSoftmax, of_warp, kWarps * kQueries);
  FASTLM_SHARED(float, o_warp, kWarps * kQueries * kLanes * kSize);
  const int64_t split = blockIdx.x % splits, bh = blockIdx.x / splits, b = bh / op.H, h = bh % op.H;
  const int64_t length = op.lengths[b], start = split * kDecodeSplit;
  if (start >= length) return;
  const int64_t end = min(start + kDecodeSplit, length), first = int64_t(blockIdx.y) * kQueries;
  const int queries = int(min(op.T - first, int64_t(kQueries)));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp * kGroups + lane / kLanes;
  const int64_t d = lane % kLanes * kSize;
  const T* q_head = static_cast<const T*>(op.q) + b * op.stride_qb + h * op.stride_qh;
  const T* k_head = static_cast<const T*>(op.k_pages) + h * op.stride_kh;
  const T* v_head = static_cast<const T*>(op.v_pages) + h * op.stride_vh;
  const int32_t* table = op.block_table + b * op.stride_tb;
  const uint32_t page_size = uint32_t(op.page);  // lengths have 32 bits, and their division is short

  float q[kQueries][kSize], o[kQueries][kSize] = {};
  OnlineSoftmax state[kQueries];
  for (int t = 0; t < kQueries; t++) {
    state[t] = {-INFINITY, 0.0f};
    Part part = {};
    if (t < queries) part = load_part<kWide>(q_head + (first + t) * op.stride_qt, d, op.D);
    for (int j = 0; j < kSize; j++) q[t][j] = to_float(elements<T>(part).at[j]);
  }
  for (int64_t s0 = start; s0 < end; s0 += kKeys * kAhead) {
    int32_t page[kAhead];
    for (int i = 0; i < kAhead; i++) {
      const int64_t s = s0 + i * kKeys + group;
      page[i] = -1;
      if (s < end) page[i] = table[uint32_t(s) / page_size];
    }
    Part k[kAhead], v[kAhead];
    for (int i = 0; i < kAhead; i++) {
      const int64_t s = s0 + i * kKeys + group, row = uint32_t(s) % page_size;
      k[i] = v[i] = {};  // what was never written may be NaN
      if (s < end) {
        k[i] = load_part<kWide>(k_head + page[i] * op.stride_kp + row * op.stride_ks, d, op.D);
        v[i] = load_part<kWide>(v_head + page[i] * op.stride_vp + row * op.stride_vs, d, op.D);
      }
    }
#pragma unroll  // or o and q would lie in memory, where a running index reaches them
    for (int t = 0; t < kQueries; t++) {
      if (t >= queries) break;
      float x[kAhead], top = state[t].m;
      for (int i = 0; i < kAhead; i++) {
        const int64_t s = s0 + i * kKeys + group;
        float dot = 0.0f;
        for (int j = 0; j < kSize; j++) dot += q[t][j] * to_float(elements<T>(k[i]).at[j]);
        for (int offset = kLanes / 2; offset; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
        x[i] = s <= length - op.T + first + t ? dot * op.scale : -INFINITY;  // so s < length too
        top = fmaxf(top, x[i]);
      }
      const float origin = OnlineSoftmax::origin(top), shrink = OnlineSoftmax::exp(state[t].m - origin);
      state[t] = {top, state[t].s * shrink};
      for (int j = 0; j < kSize; j++) o[t][j] *= shrink;
      for (int i = 0; i < kAhead; i++) {
        const float p = OnlineSoftmax::exp(x[i] - origin);
        state[t].s += p;
        for (int j = 0; j < kSize; j++) o[t][j] += p * to_float(elements<T>(v[i]).at[j]);
      }
    }
  }

  // Over the groups of a warp, then over the warps, in a fixed order.
#pragma unroll
  for (int t = 0; t < kQueries; t++) {
    if (t >= queries) break;
    for (int offset = kLanes; offset < 32; offset *= 2) {
      const OnlineSoftmax other = {__shfl_xor_sync(0xffffffffu, state[t].m, offset),
                                   __shfl_xor_sync(0xffffffffu, state[t].s, offset)};
      const float origin = OnlineSoftmax::origin(fmaxf(state[t].m, other.m));
      const float mine = OnlineSoftmax::exp(state[t].m - origin), theirs = OnlineSoftmax::exp(other.m - origin);
      for (int j = 0; j < kSize; j++)
        o[t][j] = o[t][j] * mine + __shfl_xor_sync(0xffffffffu, o[t][j], offset) * theirs;
      state[t].merge(other);
    }
    const int at = warp * kQueries + t;
    if (lane == 0) of_warp[at] = state[t];
    if (lane < kLanes)
      for (int j = 0; j < kSize; j++) o_warp[at * kLanes * kSize + d + j] = o[t][j];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < queries * kLanes * kSize; i += kThreads) {
    const int t = i / (kLanes * kSize), column = i % (kLanes * kSize);
    if (column >= op.D) continue;
    OnlineSoftmax merged = of_warp[t];
    for (int w = 1; w < kWarps; w++) merged.merge(of_warp[w * kQueries + t]);
    const float origin = OnlineSoftmax::origin(merged.m);
    float sum = 0.0f;
    for (int w = 0; w < kWarps; w++) {
      const int at = w * kQueries + t;
      sum += o_warp[at * kLanes * kSize + column] * OnlineSoftmax::exp(of_warp[at].m - origin);
    }
    const Partial partial(op.scratch, op.D, (bh * op.T + first + t) * splits + split);
    partial.o[column] = sum;
    if (column == 0) {
      *partial.m = merged.m;
      *partial.l = merged.s;
    }
  }
}

// A block merges the splits of one query of one head; a thread owns an element of o.
template <class T>
__global__ void _decode_attention_merge_kernel(DecodeAttention op, int64_t splits) {
  const int64_t row = blockIdx.x, bh = row / op.T, t = row % op.T, b = bh / op.H, h = bh % op.H, d = threadIdx.x;
  if (d >= op.D) return;
  const int64_t used = (op.lengths[b] + kDecodeSplit - 1) / kDecodeSplit;
  OnlineSoftmax state = {-INFINITY, 0.0f};
  float o = 0.0f;
  for (int64_t split = 0; split < used; split++) {
    const Partial partial(op.scratch, op.D, row * splits + split);
    const OnlineSoftmax other = {*partial.m, *partial.l};
    const float origin = OnlineSoftmax::origin(fmaxf(state.m, other.m));
    o = o * OnlineSoftmax::exp(state.m - origin) + partial.o[d] * OnlineSoftmax::exp(other.m - origin);
    state.merge(other);
  }
  static_cast<T*>(op.o)[((b * op.T + t) * op.H + h) * op.D + d] = from_float<T>(state.s == 0.0f ? 0.0f : o / state.s);
}

template <class T, int kLanes, bool kWide>
void split(const DecodeAttention& op, int64_t splits, cudaStream_t stream) {
  const int64_t blocks = op.B * op.H * splits;
  if (op.T == 1)
    FASTLM_LAUNCH((_decode_attention_split_kernel<T, kLanes, 1, kWide>), dim3(blocks), dim3(kThreads), stream, op,
                  splits);
  else
    FASTLM_LAUNCH((_decode_attention_split_kernel<T, kLanes, 4, kWide>), dim3(blocks, (op.T + 3) / 4), dim3(kThreads),
                  stream, op, splits);
}

template <class T, bool kWide>
void split(const DecodeAttention& op, int64_t splits, cudaStream_t stream) {
  const int64_t parts = (op.D + Vector<T>::kSize - 1) / Vector<T>::kSize;
  if (parts <= 8) split<T, 8, kWide>(op, splits, stream);
  else if (parts <= 16) split<T, 16, kWide>(op, splits, stream);
  else split<T, 32, kWide>(op, splits, stream);
}

template <class T>
void run(const DecodeAttention& op, cudaStream_t stream) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t splits = max((op.max_pages * op.page + kDecodeSplit - 1) / kDecodeSplit, int64_t(1));
  bool wide = op.D % kSize == 0;
  for (const void* p : {op.q, op.k_pages, op.v_pages}) wide = wide && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (int64_t stride : {op.stride_qb, op.stride_qt, op.stride_qh, op.stride_kp, op.stride_ks, op.stride_kh, op.stride_vp,
                         op.stride_vs, op.stride_vh})
    wide = wide && stride % kSize == 0;
  if (wide) split<T, true>(op, splits, stream);
  else split<T, false>(op, splits, stream);
  FASTLM_LAUNCH(_decode_attention_merge_kernel<T>, dim3(op.B * op.H * op.T), dim3((op.D + 31) / 32 * 32), stream, op,
                splits);
}

}  // namespace

void decode_attention(const DecodeAttention& op, cudaStream_t stream) {
  if (op.D > 128) throw std::invalid_argument("decode_attention: D is " + std::to_string(op.D) + ", wanted up to 128");
  if (op.B * op.T * op.H * op.D == 0) return;
  switch (op.dtype) {
    case DType::f32: run<float>(op, stream); break;
    case DType::bf16: run<__nv_bfloat16>(op, stream); break;
    case DType::f16: run<__half>(op, stream); break;
  }
  check_launch("decode_attention");
}

}  // namespace fastlm::cuda
