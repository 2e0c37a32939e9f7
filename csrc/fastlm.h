// fastlm's native kernels: every op as pointers, sizes, strides and a dtype. Knows neither torch nor Python.
//
// Letters: B sequences, T query tokens, S key tokens, H heads, D head dimension, C = H*D, V vocabulary,
// N rows (B*T). Strides count elements; a dimension without a stride is contiguous. Every op is declared
// twice: fastlm::cpu takes the size of the OpenMP team, fastlm::cuda the stream to launch on.
// A call that cannot be served throws std::invalid_argument (wrong call) or std::runtime_error (this machine).
#pragma once

#include <cstdint>
#include <string>

typedef struct CUstream_st* cudaStream_t;

namespace fastlm {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Which keys a query may see: query t of T sees key s of S where
//   kFull: always      kBottomRight: s <= t + S - T      kTopLeft: s <= t
enum Causal : int { kFull = 0, kBottomRight = 1, kTopLeft = 2 };

// lse[n] = log sum_v exp(x[n, v]);  loss[n] = lse[n] - x[n, y[n]], and 0 where y[n] == ignore.
// A label outside [0, V) that is not `ignore` gives loss[n] = NaN and is never used as an address.
struct SoftmaxXentFwd {
  float* loss;         // out (N,)
  float* lse;          // out (N,)
  const void* x;       // in  (N, V), dtype
  int64_t stride_xn;
  const int64_t* y;    // in  (N,)
  int64_t N, V, ignore;
  DType dtype;
};

// dx[n, v] = (exp(x[n, v] - lse[n]) - [v == y[n]]) * dloss[n], and 0 where y[n] == ignore.
struct SoftmaxXentBwd {
  void* dx;            // out (N, V), dtype; may be x itself
  int64_t stride_dxn;
  const float* dloss;  // in  (N,)
  const void* x;       // in  (N, V), dtype
  int64_t stride_xn;
  const int64_t* y;    // in  (N,)
  const float* lse;    // in  (N,)
  int64_t N, V, ignore;
  DType dtype;
};

// softmax_xent, forward and backward in one pass: x[n, v] becomes dx[n, v].
struct SoftmaxXentBoth {
  float* loss;         // out (N,)
  float* lse;          // out (N,)
  void* x;             // inout (N, V), dtype
  int64_t stride_xn;
  const float* dloss;  // in  (N,)
  const int64_t* y;    // in  (N,)
  int64_t N, V, ignore;
  DType dtype;
};

// Rows that a thread carries through a block of GPT-2.
constexpr int64_t kGpt2BlockRows = 48;

// L blocks of GPT-2 in fp32, N = B·T rows, F the width of the MLP. A block, y being the next one's x:
//   h1 = norm(x) ln_1;  qkv = h1 W_qkv + b;  o = attention(qkv), causal;  s = x + o W_proj + b
//   h2 = norm(s) ln_2;  u = h2 W_up + b;  g = gelu(u), slope = gelu'(u);  y = s + g W_down + b
// All tensors are contiguous, matrices (inputs, outputs). The weights of a block in order: ln_1 weight, bias; qkv, proj:
// matrix, bias; ln_2 weight, bias; up, down: matrix, bias.
struct Gpt2BlocksFwd {
  float* y;                        // out (N, C) of the last block
  float* between;                  // out (L - 1, N, C) y of the others
  float *h1, *qkv, *o;             // out (L, N, C), (L, N, 3 C), (L, N, C)
  float* lse;                      // out (L, B, H, T)
  float *s, *h2, *slope, *g;       // out (L, N, C), (L, N, C), (L, N, F), (L, N, F)
  float* statistics;               // out (L, 4, N) mean and rstd of ln_1, mean and rstd of ln_2
  const float* x;                  // in  (N, C)
  const int64_t* weights;          // in  (L, 12) addresses
  int64_t L, B, T, H, D, F;
  int64_t cut_rows;                // how products are cut, which changes no bit: so many kGpt2BlockRows together
  float epsilon;
};

struct Gpt2BlocksBwd {
  float* dx;                       // out (N, C)
  float* gradients;                // out those of the weights, one behind the other
  float* scratch;                  // (N · (8 C + F) + B · H · T + ceil(N / kGpt2BlockRows) · 8 C,)
  const float *dy, *x;             // in  (N, C)
  const float *between, *h1, *qkv, *o, *lse, *s, *h2, *slope, *g, *statistics;  // in  as forward left them
  const int64_t* weights;          // in  (L, 12) addresses
  int64_t L, B, T, H, D, F;
  int64_t cut_rows, cut_columns;   // as forward; of a block of a matrix's gradient so many columns at most
};

// Rows whose contributions to a sum over all rows are added before others are.
constexpr int64_t kColumnRows = 32;

// y[n, c] = gelu(x[n, c] + bias[c]), the tanh form.
struct BiasGeluFwd {
  void* y;             // out (N, C), dtype, contiguous
  const void* x;       // in  (N, C), dtype
  int64_t stride_xn;
  const float* bias;   // in  (C,)
  int64_t N, C;
  DType dtype;
};

// dx[n, c] = dy[n, c] gelu'(x[n, c] + bias[c]);  dbias[c] = sum_n dx[n, c], of what dx is before it is rounded.
struct BiasGeluBwd {
  void* dx;            // out (N, C), dtype, contiguous
  float* dbias;        // out (C,)
  float* scratch;      // (ceil(N / kColumnRows), C)
  const void* dy;      // in  (N, C), dtype
  int64_t stride_dyn;
  const void* x;       // in  (N, C), dtype
  int64_t stride_xn;
  const float* bias;   // in  (C,)
  int64_t N, C;
  DType dtype;
};

// s = x + x_bias + residual, y = (s - mean) * rstd * weight + bias over the C of a row, rstd = 1 / sqrt(variance + epsilon).
struct LayerNormFwd {
  void* y;                // out (N, C), y_dtype, contiguous
  void* s;                // out (N, C), s_dtype, contiguous; null where residual is
  float* mean;            // out (N,)
  float* rstd;            // out (N,)
  const void* x;          // in  (N, C), dtype
  int64_t stride_xn;
  const void* residual;   // in  (N, C), s_dtype, or null: s is x
  int64_t stride_rn;
  const float* x_bias;    // in  (C,), or null: 0; with a residual alone
  const float* weight;    // in  (C,)
  const float* bias;      // in  (C,)
  int64_t N, C;
  float epsilon;
  DType dtype, s_dtype, y_dtype;
};

// dx = dresidual = ds + the gradient of the normalisation by s;  sums = those of weight and bias, and of x_bias if
// there are 3.
struct LayerNormBwd {
  void* dx;               // out (N, C), dtype, contiguous
  void* dresidual;        // out (N, C), s_dtype, contiguous, or null
  float* sums;            // out (count, C)
  float* scratch;         // (ceil(N / kColumnRows), count, C)
  const void* dy;         // in  (N, C), y_dtype
  int64_t stride_dyn;
  const void* ds;         // in  (N, C), s_dtype, or null: 0
  int64_t stride_dsn;
  const void* s;          // in  (N, C), s_dtype
  int64_t stride_sn;
  const float* weight;    // in  (C,)
  const float* mean;      // in  (N,)
  const float* rstd;      // in  (N,)
  int64_t N, C, count;
  DType dtype, s_dtype, y_dtype;
};

// A step of AdamW (decoupled weight decay) over n values, with gradients g * scale; none where scale is not finite.
struct Adamw {
  float* p;               // inout (n,)
  const float* g;         // in    (n,)
  float* exp_avg;         // inout (n,)
  float* exp_avg_sq;      // inout (n,)
  const float* scale;     // in    (), null: 1
  int64_t n;
  float learning_rate, one_minus_beta1, beta2, one_minus_beta2, epsilon, weight_decay;
  float bias_correction1, bias_correction2;  // 1 - beta^step
};

// Values whose squares are summed before others are.
constexpr int64_t kNormPiece = 65536;

// norm = sqrt(sum_i g[i]²)
struct GradNorm {
  float* norm;            // out ()
  float* scratch;         // (ceil(n / kNormPiece),)
  const float* g;         // in  (n,)
  int64_t n;
};

// p[t, s] = softmax_s(scale * q[t]·k[s]) over the keys that `causal` lets t see;  o[t] = sum_s drop(p)[t, s] v[s];
// lse[t] = log sum_s exp(scale * q[t]·k[s]). A query that sees no key gets o = 0, lse = -inf.
//
// drop(p)[t, s] = p[t, s] * 256 / (256 - drop) where byte(t, s) >= drop, else 0. byte(t, s) is byte s % 16 (little
// endian, words in order) of Philox4x32-10 with key (lo32(seed[0]), lo32(seed[1])) and counter
// (s / 16, t, lo32(seed[3] + b), seed[2] << 16 | h): seed = (seed, step, layer, index of the first sequence).
//
// gpt2_step.cpp, gpt2_blocks.cpp and tests/emulation/sweep_attention.cpp fill it too.
struct AttentionFwd {
  void* o;             // out (B, T, H, D), dtype
  int64_t stride_ob, stride_ot, stride_oh;
  float* lse;          // out (B, H, T)
  const void* q;       // in  (B, T, H, D), dtype
  int64_t stride_qb, stride_qt, stride_qh;
  const void* k;       // in  (B, S, H, D), dtype
  int64_t stride_kb, stride_ks, stride_kh;
  const void* v;       // in  (B, S, H, D), dtype
  int64_t stride_vb, stride_vs, stride_vh;
  const int64_t* seed; // in  (4,), null where drop == 0
  int64_t B, T, S, H, D;
  int causal;          // Causal
  float scale;
  int drop;            // dropped with probability drop / 256
  DType dtype;
};

// delta[t] = do[t]·o[t];  dp = drop(do·v);  ds = p * (dp - delta);  dq = scale * ds k;  dk = scale * ds^T q;
// dv = drop(p)^T do.
struct AttentionBwd {
  void* dq;            // out (B, T, H, D), dtype
  int64_t stride_dqb, stride_dqt, stride_dqh;
  void* dk;            // out (B, S, H, D), dtype
  int64_t stride_dkb, stride_dks, stride_dkh;
  void* dv;            // out (B, S, H, D), dtype
  int64_t stride_dvb, stride_dvs, stride_dvh;
  float* delta;        // out (B, H, T), scratch
  const void* do_;     // in  (B, T, H, D), dtype
  int64_t stride_dob, stride_dot, stride_doh;
  const void* q;       // in  (B, T, H, D), dtype
  int64_t stride_qb, stride_qt, stride_qh;
  const void* k;       // in  (B, S, H, D), dtype
  int64_t stride_kb, stride_ks, stride_kh;
  const void* v;       // in  (B, S, H, D), dtype
  int64_t stride_vb, stride_vs, stride_vh;
  const void* o;       // in  (B, T, H, D), dtype
  int64_t stride_ob, stride_ot, stride_oh;
  const float* lse;    // in  (B, H, T)
  const int64_t* seed; // in  (4,), null where drop == 0
  int64_t B, T, S, H, D;
  int causal;          // Causal
  float scale;
  int drop;
  DType dtype;
};

// Positions that one block of a GPU attends to: a constant, so that the order of the sums depends on nothing else.
constexpr int64_t kDecodeSplit = 128;

// Attention of the T newest tokens of each sequence over its pages: lengths[b] counts them too, and query t sees
// the positions s <= lengths[b] - T + t. Position s of sequence b lies in page block_table[b, s / page], row s % page.
struct DecodeAttention {
  void* o;                    // out (B, T, H, D), dtype, contiguous
  float* scratch;             // (B, H, T, ceil(max_pages * page / kDecodeSplit), D + 2) on a GPU, null on the CPU
  const void* q;              // in  (B, T, H, D), dtype
  int64_t stride_qb, stride_qt, stride_qh;
  const void* k_pages;        // in  (pages, page, H, D), dtype
  int64_t stride_kp, stride_ks, stride_kh;
  const void* v_pages;        // in  (pages, page, H, D), dtype
  int64_t stride_vp, stride_vs, stride_vh;
  const int32_t* block_table; // in  (B, max_pages)
  int64_t stride_tb;
  const int32_t* lengths;     // in  (B,)
  int64_t B, T, H, D, page, max_pages;
  float scale;
  DType dtype;
};

// k_pages[block_table[b, p / page], p % page] = k[b, t] with p = positions[b, t], likewise v; p = -1 writes nothing.
struct CacheAppend {
  void* k_pages;              // inout (pages, page, H, D), dtype
  int64_t stride_kpp, stride_kps, stride_kph;
  void* v_pages;              // inout (pages, page, H, D), dtype
  int64_t stride_vpp, stride_vps, stride_vph;
  const void* k;              // in  (B, T, H, D), dtype
  int64_t stride_kb, stride_kt, stride_kh;
  const void* v;              // in  (B, T, H, D), dtype
  int64_t stride_vb, stride_vt, stride_vh;
  const int32_t* block_table; // in  (B, max_pages)
  int64_t stride_tb;
  const int32_t* positions;   // in  (B, T)
  int64_t stride_pb;
  int64_t B, T, H, D, page, max_pages;
  DType dtype;
};

// Packed weights: outputs of a panel, and inputs that share a scale in int4 (csrc/cpu/products/packed.h).
constexpr int64_t kPanel = 16, kWeightGroup = 64;
enum class Weights : int { f32 = 0, bf16 = 1, int8 = 2, int4 = 3 };

// The newest tokens of each sequence through a GPT-2 whose keys and values lie in pages; on the CPU alone. Sequence b
// has counts[b] new tokens, 0 … T, from positions[b] on; their keys and values are appended, and logits[b] are those
// behind the last of them (untouched where there is none); with `every` they are those behind each new token, row by row.
// C = H*D; N stands for a product's outputs.
struct Gpt2Step {
  float* logits;              // out (B, V rounded up to 32), with `every` (sum of counts, …)
  int64_t* ids;               // out (B,) tokens drawn from the logits, `tokens` too where T is 1; null: none, and not
                              //     with `every`
  const int64_t* layers;      // in  (L, 22) addresses: ln_1 weight, bias, ln_2 weight, bias (C,) fp32, k_pages, v_pages
                              //     (pages, page, H, D) page_dtype, strided alike, then for qkv, proj, up, down: panels,
                              //     bias, scale (N,) fp32, sums (N,) int32, each rounded up to 16; scale and sums are
                              //     those of int8
  const char* head;           // in  panels (C, V)
  const float* head_scale;    // in  (V,), rounded up to 16, as above
  const int32_t* head_sums;
  const float* ln_f_w;        // in  (C,)
  const float* ln_f_b;
  const void* wte;            // in  (V, C), dtype
  const void* wpe;            // in  (P, C), dtype
  const int64_t* tokens;      // in  (B, T)
  int32_t* positions;         // in  (B,), out: more by counts
  const int32_t* counts;      // in  (B,)
  const int32_t* block_table; // in  (B, max_pages)
  const double* uniform;      // in  (B, steps) for the draws, and how: see Draw
  int64_t* step;              // in  (1,) the column of uniform, out: the next one
  int64_t stride_u, choices, top_k;
  double temperature, top_p;
  int64_t stride_p, stride_s, stride_h;  // of k_pages and v_pages: a page, a position, a head
  int64_t B, T, L, H, D, V, inner, page, max_pages, every;
  int64_t pages, P, steps;    // of k_pages and v_pages, rows of wpe, columns of uniform: what no id, count, position or
                              //     entry of the table may pass
  int64_t cut_panels, cut_bytes;  // how products are cut, which changes no bit: csrc/cpu/products/cut.h
  float epsilon;
  Weights weights, head_weights;
  DType page_dtype, dtype;
};

// The next token of every row of logits.
struct Draw {
  int64_t* ids;           // out (B,) below choices; kBad where a row is no distribution
  const float* logits;    // in  (B, choices)
  const double* uniform;  // in  (B,) from 0 on, below 1
  int64_t stride_lb, stride_u, B, choices;
  double temperature;     // 0: the largest
  int64_t top_k;          // 0: all
  double top_p;           // 1: all
};

constexpr int64_t kBad = -2;  // in place of a token

constexpr int64_t kChecksums = 47;  // a prime: lines so far apart meet every row, and every column, of most matrices

// Checksums of spans of memory, in lines of 64 bytes: sum k is over the lines of every span whose number, modulo how far
// the lines of its sums lie apart, is k modulo that.
struct Checksum {
  int64_t* sums;         // out (kChecksums,)
  const int64_t* spans;  // in  (count, 3) address, bytes, from 1 to kChecksums: how far the lines of a sum lie apart
  int64_t count, only;   // the one sum that is wanted, the others being 0; below 0: all
};

namespace cpu {
void softmax_xent_fwd(const SoftmaxXentFwd& op, int threads);
void softmax_xent_bwd(const SoftmaxXentBwd& op, int threads);
void softmax_xent_(const SoftmaxXentBoth& op, int threads);
void gpt2_blocks_fwd(const Gpt2BlocksFwd& op, int threads);
void gpt2_blocks_bwd(const Gpt2BlocksBwd& op, int threads);
void bias_gelu_fwd(const BiasGeluFwd& op, int threads);
void bias_gelu_bwd(const BiasGeluBwd& op, int threads);
void layer_norm_fwd(const LayerNormFwd& op, int threads);
void layer_norm_bwd(const LayerNormBwd& op, int threads);
void adamw_(const Adamw& op, int threads);
void grad_norm(const GradNorm& op, int threads);
void attention_fwd(const AttentionFwd& op, int threads);
void attention_bwd(const AttentionBwd& op, int threads);
void decode_attention(const DecodeAttention& op, int threads);
void cache_append_(const CacheAppend& op, int threads);
void gpt2_step(const Gpt2Step& op, int threads);
void draw(const Draw& op, int threads);
void checksum(const Checksum& op, int threads);

// The instruction set the kernels run on: "avx512bf16", "avx512", "avx2" or "generic"; FASTLM_CPU_ISA asks for a lower one.
const char* isa();
// Those that were built, in ascending order: "generic, avx2".
std::string isas();
// The widest that this CPU has, built or not.
const char* widest_isa();
}  // namespace cpu

namespace cuda {
void softmax_xent_fwd(const SoftmaxXentFwd& op, cudaStream_t stream);
void softmax_xent_bwd(const SoftmaxXentBwd& op, cudaStream_t stream);
void softmax_xent_(const SoftmaxXentBoth& op, cudaStream_t stream);
void attention_fwd(const AttentionFwd& op, cudaStream_t stream);
void decode_attention(const DecodeAttention& op, cudaStream_t stream);
void cache_append_(const CacheAppend& op, cudaStream_t stream);
}  // namespace cuda

}  // namespace fastlm
