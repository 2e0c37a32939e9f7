// Causal softmax attention on the tensor cores, forward, in bf16 and fp16; the backward is left to other backends.
//
//   x[t, s] = scale q[t]·k[s],  p = softmax_s(x),  o[t] = sum_s drop(p)[t, s] v[s],  lse[t] = log sum_s exp(x[t, s])
//
// A block owns kTileT queries of one head, a warp 16 of them, and walks over the keys in tiles of kTileS. Q stays in
// registers; while a tile's scores are computed its V is on the way to shared memory, and while P V is computed the next
// K is. The accumulator of q kᵀ has the layout that the left operand of P V wants, so P never leaves the registers.
// Rows in shared memory lie 16 bytes further apart than they are long: eight rows of a matrix load meet no bank twice.
// Source: Dao, arXiv 2307.08691, algorithm 1.
#include "philox.h"
#include "warp.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kTileT = 16 * kWarps, kTileS = 64;

// Rows first … first + kTileS of a head (rows, D) to a tile; zeros beyond its rows and beyond D.
template <class T, int kD>
__device__ void fetch(T* tile, const T* head, int64_t stride, int64_t first, int64_t rows, int64_t D, bool wide) {
  constexpr int kVectors = kD / 8, kRow = kD + 8;
  for (int i = threadIdx.x; i < kTileS * kVectors; i += kThreads) {
    const int row = i / kVectors, d = i % kVectors * 8;
    const T* from = head + (first + row) * stride + d;
    T* to = tile + row * kRow + d;
    if (wide && first + row < rows && d < D) {
      copy_async(to, from);
    } else {
      for (int j = 0; j < 8; j++) to[j] = first + row < rows && d + j < D ? from[j] : from_float<T>(0.0f);
    }
  }
}

// The running softmax of a lane's two query rows.
struct Rows {
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.0f, 0.0f};  // l: the sum over this lane's columns alone
};

// x (scores of 16 queries and kTileS keys) becomes p; o and l are rescaled to the new maximum.
template <int kTiles>
__device__ void softmax(float (&x)[kTileS / 8][4], float (&o)[kTiles][4], Rows& rows) {
  for (int r = 0; r < 2; r++) {
    float top = rows.m[r];
    for (int n = 0; n < kTileS / 8; n++) top = fmaxf(top, fmaxf(x[n][2 * r], x[n][2 * r + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float origin = OnlineSoftmax::origin(top), shrink = exp2f(rows.m[r] - origin);
    rows.m[r] = top;
    rows.l[r] *= shrink;
    for (int n = 0; n < kTiles; n++) {
      o[n][2 * r] *= shrink;
      o[n][2 * r + 1] *= shrink;
    }
    for (int n = 0; n < kTileS / 8; n++)
      for (int i = 2 * r; i < 2 * r + 2; i++) {
        x[n][i] = exp2f(x[n][i] - origin);
        rows.l[r] += x[n][i];
      }
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(kThreads) _attention_fwd_kernel(AttentionFwd op, int64_t tiles, bool wide) {
  constexpr int kRow = kD + 8, kSteps = kD / 16, kTiles = kD / 8;
  FASTLM_SHARED(T, k_tile, kTileS * kRow);
  FASTLM_SHARED(T, v_tile, kTileS * kRow);
  const int64_t bh = blockIdx.x / tiles, b = bh / op.H, h = bh % op.H;
  const int64_t t0 = (tiles - 1 - blockIdx.x % tiles) * kTileT;  // the longest rows first
  const T* q_head = static_cast<const T*>(op.q) + b * op.stride_qb + h * op.stride_qh;
  const T* k_head = static_cast<const T*>(op.k) + b * op.stride_kb + h * op.stride_kh;
  const T* v_head = static_cast<const T*>(op.v) + b * op.stride_vb + h * op.stride_vh;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int64_t t_lane = t0 + warp * 16 + g;                     // this lane's queries: t_lane and t_lane + 8
  const int64_t offset = op.causal == kBottomRight ? op.S - op.T : 0;
  int64_t end = op.S, whole = op.S;                              // keys below `whole` every query of the block sees
  if (op.causal != kFull) {
    end = max(min(op.S, t0 + kTileT + offset), int64_t(0));
    whole = max(min(op.S, t0 + 1 + offset), int64_t(0));
  }

  fetch<T, kD>(k_tile, q_head, op.stride_qt, t0, op.T, op.D, wide);
  wait_for_copies();
  __syncthreads();
  uint32_t q_part[kSteps][4];                                    // (16, 16) each
  for (int step = 0; step < kSteps; step++)
    load_matrices(q_part[step], k_tile + (warp * 16 + lane % 16) * kRow + step * 16 + lane / 16 * 8);
  __syncthreads();

  const float scale = op.scale * kLog2e;
  const DropoutMask mask(op.seed, b, h, op.drop);
  float o[kTiles][4] = {};                                       // (16, 8) each
  Rows rows;
  if (end > 0) fetch<T, kD>(k_tile, k_head, op.stride_ks, 0, op.S, op.D, wide);
  for (int64_t s0 = 0; s0 < end; s0 += kTileS) {
    wait_for_copies();
    __syncthreads();                                             // K is here, and nobody reads the former V
    fetch<T, kD>(v_tile, v_head, op.stride_vs, s0, op.S, op.D, wide);

    float x[kTileS / 8][4] = {};                                 // (16, 8) each
    for (int n = 0; n < kTileS / 8; n += 2)
      for (int step = 0; step < kSteps; step++) {
        uint32_t k_part[4];                                      // (16, 8) of keys n · 8 …, and of the next eight
        load_matrices(k_part, k_tile + (n * 8 + lane / 16 * 8 + lane % 8) * kRow + step * 16 + lane / 8 % 2 * 8);
        multiply_add(x[n], q_part[step], k_part, T());
        multiply_add(x[n + 1], q_part[step], k_part + 2, T());
      }
    for (int n = 0; n < kTileS / 8; n++)
      for (int i = 0; i < 4; i++) {
        const int64_t s = s0 + n * 8 + 2 * q + i % 2, t = t_lane + i / 2 * 8;
        x[n][i] *= scale;
        if (s0 + kTileS > whole && (s >= op.S || (op.causal != kFull && s > t + offset))) x[n][i] = -INFINITY;
      }
    softmax(x, o, rows);
    if (op.drop) {
#pragma unroll  // or x would lie in memory, where a running index reaches it
      for (int n = 0; n < kTileS / 8; n += 2)
        for (int r = 0; r < 2; r++) {
          const PhiloxWords bytes = mask.bytes(t_lane + 8 * r, s0 + n * 8);
          for (int i = 0; i < 4; i++)
            if (!mask.keeps(bytes, i / 2 * 8 + 2 * q + i % 2)) x[n + i / 2][2 * r + i % 2] = 0.0f;
        }
    }

    wait_for_copies();
    __syncthreads();                                             // V is here, and nobody reads this K
    if (s0 + kTileS < end) fetch<T, kD>(k_tile, k_head, op.stride_ks, s0 + kTileS, op.S, op.D, wide);
    for (int step = 0; step < kTileS / 16; step++) {
      const uint32_t p_part[4] = {
          pack(x[2 * step][0], x[2 * step][1], T()), pack(x[2 * step][2], x[2 * step][3], T()),
          pack(x[2 * step + 1][0], x[2 * step + 1][1], T()), pack(x[2 * step + 1][2], x[2 * step + 1][3], T())};
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t v_part[4];                                      // (16, 8) of columns n · 8 …, and of the next eight
        load_matrices_transposed(v_part, v_tile + (step * 16 + lane % 16) * kRow + n * 8 + lane / 16 * 8);
        multiply_add(o[n], p_part, v_part, T());
        multiply_add(o[n + 1], p_part, v_part + 2, T());
      }
    }
  }

  for (int r = 0; r < 2; r++) {
    float l = rows.l[r];
    l += __shfl_xor_sync(0xffffffffu, l, 1);
    l += __shfl_xor_sync(0xffffffffu, l, 2);
    const int64_t t = t_lane + 8 * r;
    if (t >= op.T) continue;
    const float weight = l == 0.0f ? 0.0f : mask.scale() / l;
    T* out = static_cast<T*>(op.o) + b * op.stride_ob + t * op.stride_ot + h * op.stride_oh;
    for (int n = 0; n < kTiles; n++)
      for (int i = 0; i < 2; i++) {
        const int d = n * 8 + 2 * q + i;
        if (d < op.D) out[d] = from_float<T>(o[n][2 * r + i] * weight);
      }
    if (q == 0) op.lse[bh * op.T + t] = l == 0.0f ? -INFINITY : (rows.m[r] + log2f(l)) * kLn2;
  }
}

// Whether every row of an operand begins at a multiple of 16 bytes.
bool aligned(const void* p, int64_t stride_b, int64_t stride_t, int64_t stride_h) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_b % 8 == 0 && stride_t % 8 == 0 && stride_h % 8 == 0;
}

template <class T>
void fwd(const AttentionFwd& op, cudaStream_t stream) {
  const int64_t tiles = (op.T + kTileT - 1) / kTileT;
  const dim3 grid(tiles * op.B * op.H), block(kThreads);
  const bool wide = op.D % 8 == 0 && aligned(op.q, op.stride_qb, op.stride_qt, op.stride_qh) &&
                    aligned(op.k, op.stride_kb, op.stride_ks, op.stride_kh) &&
                    aligned(op.v, op.stride_vb, op.stride_vs, op.stride_vh);
  if (op.D <= 32) FASTLM_LAUNCH((_attention_fwd_kernel<T, 32>), grid, block, stream, op, tiles, wide);
  else if (op.D <= 64) FASTLM_LAUNCH((_attention_fwd_kernel<T, 64>), grid, block, stream, op, tiles, wide);
  else FASTLM_LAUNCH((_attention_fwd_kernel<T, 128>), grid, block, stream, op, tiles, wide);
}

}  // namespace

void attention_fwd(const AttentionFwd& op, cudaStream_t stream) {
  if (op.D > 128) throw std::invalid_argument("attention_fwd: D is " + std::to_string(op.D) + ", wanted up to 128");
  if (op.B * op.T * op.H == 0) return;
  switch (op.dtype) {
    case DType::bf16: fwd<__nv_bfloat16>(op, stream); break;
    case DType::f16: fwd<__half>(op, stream); break;
    case DType::f32: throw std::invalid_argument("attention_fwd: dtype is float32, wanted bfloat16 or float16");
  }
  check_launch("attention_fwd");
}

}  // namespace fastlm::cuda
