// A whole block of GPT-2 on the CPU, forward and backward, in one call each.
//
// The weights are packed (matmul.h), then threads take blocks of kRows rows and carry them through everything that treats
// rows alone, in their own caches: up to qkv, and from o to y. Between is the attention (attention.cpp). Backward, dy
// being the gradient of y:
//
//   du = (dy W_down^T) gelu'(u);  dh2 = du W_up^T;  ds = dy + norm'(dh2);  do = ds W_proj^T        blocks of rows
//   dqkv = attention'(do)
//   dh1 = dqkv W_qkv^T;  dx = ds + norm'(dh1)                                                      blocks of rows
//
// and then a matrix's gradient is its input transposed times its output's gradient, whose sums over rows are the bias's.
#include <omp.h>

#include <cmath>

#include "isa.h"
#include "matmul.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kRows = kGpt2BlockRows;

// A matrix (from, to) with its bias and, once it is packed, its panels.
struct Linear {
  const float *w, *bias;
  int64_t from, to;
  float* panels = nullptr;
};

struct Norm {
  const float *w, *b;
};

// The weights of a block, in their order.
struct Parts {
  Norm ln_1, ln_2;
  Linear qkv, proj, up, down;

  Parts(const int64_t* addresses, int64_t C, int64_t F) {
    const auto next = [&] { return reinterpret_cast<const float*>(*addresses++); };
    const auto norm = [&] { return Norm{next(), next()}; };
    const auto linear = [&](int64_t from, int64_t to) { return Linear{next(), next(), from, to}; };
    ln_1 = norm(), qkv = linear(C, 3 * C), proj = linear(C, C), ln_2 = norm(), up = linear(C, F), down = linear(F, C);
  }
};

// y (N, to) = x (N, from) W + b
Matmul forward(float* y, const float* x, const Linear& linear, int64_t N) {
  Matmul op{};
  op.y = y, op.stride_ym = linear.to, op.a = x, op.stride_am = linear.from, op.stride_ak = 1;
  op.b = linear.w, op.stride_bk = linear.to, op.stride_bn = 1, op.bias = linear.bias;
  op.M = N, op.N = linear.to, op.K = linear.from;
  return op;
}

// dx (N, from) = dy (N, to) W^T
Matmul backward(float* dx, const float* dy, const Linear& linear, int64_t N) {
  Matmul op{};
  op.y = dx, op.stride_ym = linear.from, op.a = dy, op.stride_am = linear.to, op.stride_ak = 1;
  op.b = linear.w, op.stride_bk = 1, op.stride_bn = linear.to;
  op.M = N, op.N = linear.from, op.K = linear.to;
  return op;
}

// dW (from, to) = x (N, from)^T dy (N, to), and behind it db = the sums of dy over its rows.
void weight_gradient(float* dw, const float* x, const float* dy, const Linear& linear, int64_t N, int threads) {
  Matmul op{};
  op.y = dw, op.stride_ym = linear.to, op.column_sums = dw + linear.from * linear.to;
  op.a = x, op.stride_am = 1, op.stride_ak = linear.from;
  op.b = dy, op.stride_bk = linear.to, op.stride_bn = 1;
  op.M = linear.from, op.N = linear.to, op.K = N;
  matmul(op, threads);
}

// Packs what products multiply with, all threads of a team together, and waits until that is done.
void pack(std::initializer_list<const Matmul*> products, std::initializer_list<const Linear*> linears) {
  auto linear = linears.begin();
  for (const Matmul* op : products) {
    float* panels = (*linear++)->panels;
#pragma omp for schedule(dynamic, 2) nowait
    for (int64_t p = 0; p < ceil(op->N, kTileColumns); p++)
      pack_panel<float>(panels + p * kTileColumns * op->K, nullptr, *op, p * kTileColumns);
  }
#pragma omp barrier
}

// Rows m0 … of a product with what was packed.
void rows_of(const Matmul& op, const Linear& linear, int64_t m0, int64_t rows) {
  block<false>(op, linear.panels, m0, rows, 0, op.N);
}

// Room for the panels of the matrices, kept between calls; each is as large packed as it is, or with W^T, rounded up.
void place_panels(std::initializer_list<Linear*> linears) {
  thread_local std::vector<float> memory;
  const auto floats = [](const Linear& linear) {
    return std::max(linear.from * up(linear.to, kTileColumns), linear.to * up(linear.from, kTileColumns));
  };
  int64_t all = 0;
  for (const Linear* linear : linears) all += up(floats(*linear), 16);
  float* next = kept(memory, all);
  for (Linear* linear : linears) linear->panels = next, next += up(floats(*linear), 16);
}

// Rows m0 … normalised; statistics (2, N).
void norm_forward(float* y, float* statistics, const float* x, const Norm& norm, int64_t N, int64_t C, float epsilon,
                  int64_t m0, int64_t rows) {
  LayerNormFwd op{};
  op.y = y + m0 * C, op.mean = statistics + m0, op.rstd = statistics + N + m0, op.x = x + m0 * C, op.stride_xn = C;
  op.weight = norm.w, op.bias = norm.b, op.N = rows, op.C = C, op.epsilon = epsilon;
  layer_norm_fwd(op, 1);
}

// Rows m0 …: dx = ds + the gradient of the norm of x by x; what they add to those of its weight and bias to sums (2, C).
void norm_backward(float* dx, float* sums, float* scratch, const float* dy, const float* ds, const float* x,
                   const Norm& norm, const float* statistics, int64_t N, int64_t C, int64_t m0, int64_t rows) {
  LayerNormBwd op{};
  op.dx = dx + m0 * C, op.dweight_dbias = sums, op.scratch = scratch;
  op.dy = dy + m0 * C, op.stride_dyn = C, op.ds = ds + m0 * C, op.stride_dsn = C, op.s = x + m0 * C, op.stride_sn = C;
  op.weight = norm.w, op.mean = statistics + m0, op.rstd = statistics + N + m0, op.N = rows, op.C = C;
  layer_norm_bwd(op, 1);
}

// to (width,) = the sum of sums (blocks, width), in order.
void add_up(float* to, const float* sums, int64_t blocks, int64_t width) {
  std::fill_n(to, width, 0.0f);
  for (int64_t i = 0; i < blocks; i++)
    for (int64_t c = 0; c < width; c++) to[c] += sums[i * width + c];
}

// body(m0, rows) for every block of kRows rows of N, shared out among the threads of a team.
template <class Body>
void for_rows(int64_t N, Body&& body) {
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < ceil(N, kRows); i++) body(i * kRows, std::min(kRows, N - i * kRows));
}

// What forward and backward of the attention have in common.
template <class Attention, class Op>
Attention attention_of(const Op& op) {
  const int64_t C = op.H * op.D, rows = 3 * C;
  Attention attention{};
  attention.q = op.qkv, attention.k = op.qkv + C, attention.v = op.qkv + 2 * C, attention.o = op.o;
  attention.stride_qt = attention.stride_ks = attention.stride_vs = rows;
  attention.stride_qb = attention.stride_kb = attention.stride_vb = op.T * rows;
  attention.stride_ot = C, attention.stride_ob = op.T * C;
  attention.stride_qh = attention.stride_kh = attention.stride_vh = attention.stride_oh = op.D;
  attention.lse = op.lse;
  attention.B = op.B, attention.T = attention.S = op.T, attention.H = op.H, attention.D = op.D;
  attention.causal = kBottomRight, attention.scale = 1.0f / std::sqrt(float(op.D));
  return attention;
}

}  // namespace

void gpt2_block_fwd(const Gpt2BlockFwd& op, int threads) {
  const int64_t N = op.B * op.T, C = op.H * op.D;
  Parts parts(op.weights, C, op.F);
  place_panels({&parts.qkv, &parts.proj, &parts.up, &parts.down});
  const Matmul qkv = forward(op.qkv, op.h1, parts.qkv, N);
  Matmul proj = forward(op.s, op.o, parts.proj, N), up = forward(op.u, op.h2, parts.up, N);
  Matmul down = forward(op.y, op.g, parts.down, N);
  proj.residual = op.x, up.gelu = op.g, down.residual = op.s;

#pragma omp parallel num_threads(threads)
  {
    pack({&qkv, &proj, &up, &down}, {&parts.qkv, &parts.proj, &parts.up, &parts.down});
    for_rows(N, [&](int64_t m0, int64_t rows) {
      norm_forward(op.h1, op.statistics, op.x, parts.ln_1, N, C, op.epsilon, m0, rows);
      rows_of(qkv, parts.qkv, m0, rows);
    });
  }
  attention_fwd(attention_of<AttentionFwd>(op), threads);
#pragma omp parallel num_threads(threads)
  for_rows(N, [&](int64_t m0, int64_t rows) {
    rows_of(proj, parts.proj, m0, rows);
    norm_forward(op.h2, op.statistics + 2 * N, op.s, parts.ln_2, N, C, op.epsilon, m0, rows);
    rows_of(up, parts.up, m0, rows);
    rows_of(down, parts.down, m0, rows);
  });
}

void gpt2_block_bwd(const Gpt2BlockBwd& op, int threads) {
  const int64_t N = op.B * op.T, C = op.H * op.D, F = op.F, blocks = ceil(N, kRows);
  Parts parts(op.weights, C, F);
  place_panels({&parts.qkv, &parts.proj, &parts.up, &parts.down});
  float *du = op.scratch, *dh = du + N * F, *ds = dh + N * C, *dqkv = ds + N * C, *d_o = dqkv + 3 * N * C;
  float *delta = d_o + N * C, *sums_1 = delta + op.B * op.H * op.T, *sums_2 = sums_1 + blocks * 2 * C;
  float* norm_scratch = sums_2 + blocks * 2 * C;  // two blocks of kColumnRows rows for each block
  float *d_ln_1 = op.gradients, *d_qkv = d_ln_1 + 2 * C, *d_proj = d_qkv + (C + 1) * 3 * C;
  float *d_ln_2 = d_proj + (C + 1) * C, *d_up = d_ln_2 + 2 * C, *d_down = d_up + (C + 1) * F;
  Matmul down = backward(du, op.dy, parts.down, N);
  const Matmul up = backward(dh, du, parts.up, N), proj = backward(d_o, ds, parts.proj, N);
  const Matmul qkv = backward(dh, dqkv, parts.qkv, N);
  down.slope_of = op.u;
  static_assert(kRows <= 2 * kColumnRows);

#pragma omp parallel num_threads(threads)
  {
    pack({&down, &up, &proj, &qkv}, {&parts.down, &parts.up, &parts.proj, &parts.qkv});
    for_rows(N, [&](int64_t m0, int64_t rows) {
      const int64_t i = m0 / kRows;
      rows_of(down, parts.down, m0, rows);
      rows_of(up, parts.up, m0, rows);
      norm_backward(ds, sums_2 + i * 2 * C, norm_scratch + i * 4 * C, dh, op.dy, op.s, parts.ln_2,
                    op.statistics + 2 * N, N, C, m0, rows);
      rows_of(proj, parts.proj, m0, rows);
    });
  }
  AttentionBwd attention = attention_of<AttentionBwd>(op);
  attention.do_ = d_o, attention.stride_dob = op.T * C, attention.stride_dot = C, attention.stride_doh = op.D;
  attention.dq = dqkv, attention.dk = dqkv + C, attention.dv = dqkv + 2 * C, attention.delta = delta;
  attention.stride_dqt = attention.stride_dks = attention.stride_dvs = 3 * C;
  attention.stride_dqb = attention.stride_dkb = attention.stride_dvb = op.T * 3 * C;
  attention.stride_dqh = attention.stride_dkh = attention.stride_dvh = op.D;
  attention_bwd(attention, threads);
#pragma omp parallel num_threads(threads)
  for_rows(N, [&](int64_t m0, int64_t rows) {
    const int64_t i = m0 / kRows;
    rows_of(qkv, parts.qkv, m0, rows);
    norm_backward(op.dx, sums_1 + i * 2 * C, norm_scratch + i * 4 * C, dh, ds, op.x, parts.ln_1, op.statistics, N, C,
                  m0, rows);
  });
  add_up(d_ln_1, sums_1, blocks, 2 * C);
  add_up(d_ln_2, sums_2, blocks, 2 * C);
  weight_gradient(d_down, op.g, op.dy, parts.down, N, threads);
  weight_gradient(d_up, op.h2, du, parts.up, N, threads);
  weight_gradient(d_proj, op.o, ds, parts.proj, N, threads);
  weight_gradient(d_qkv, op.h1, dqkv, parts.qkv, N, threads);
}

}  // namespace fastlm::cpu::FASTLM_ISA
