// Whole blocks of GPT-2 on the CPU, forward and backward, in one call each.
//
// The weights are packed (products/blocked.h), then threads take blocks of kRows rows and carry them through everything
// that treats rows alone, in their own caches: up to qkv, and from o to y. Between is the attention (attention.cpp). Backward, dy
// being the gradient of y:
//
//   du = (dy W_down^T) slope;  dh2 = du W_up^T;  ds = dy + norm'(dh2);  do = ds W_proj^T            blocks of rows
//   dqkv = attention'(do)
//   dh1 = dqkv W_qkv^T;  dx = ds + norm'(dh1)                                                      blocks of rows
//
// and then a matrix's gradient is its input transposed times its output's gradient, whose sums over rows are the bias's.
#include <omp.h>

#include <cmath>

#include "isa.h"
#include "products/blocked.h"
#include "team.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kRows = kGpt2BlockRows;  // whose contributions to a norm's gradients are added before others are

// A matrix (from, to) with its bias.
struct Linear {
  const float *w, *bias;
  int64_t from, to;
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
Product forward(float* y, const float* x, const Linear& linear, int64_t N) {
  return {y, x, linear.from, 1, linear.w, linear.to, 1, N, linear.to, linear.from, linear.bias};
}

// dx (N, from) = dy (N, to) W^T
Product backward(float* dx, const float* dy, const Linear& linear, int64_t N) {
  return {dx, dy, linear.to, 1, linear.w, 1, linear.to, N, linear.from, linear.to};
}

// dW (from, to) = x (N, from)^T dy (N, to)
Product gradient(float* dw, const float* x, const float* dy, const Linear& linear, int64_t N) {
  return {dw, x, 1, linear.from, dy, linear.to, 1, linear.from, linear.to, N};
}

// Products and the panels of what they multiply with, in memory that is kept between calls.
class Packed {
 public:
  Packed(std::initializer_list<Product> products) : products_(products) {
    thread_local std::vector<float> memory;
    int64_t floats = 0;
    for (const Product& op : products_) {
      starts_.push_back(floats);
      floats += round_up(round_up(op.N, kTileColumns) * op.K, kLine);
    }
    memory_ = kept(memory, floats);
  }

  // All threads of a team pack together, and wait until that is done. sums (N,): where the sums over K go, or nothing.
  void pack(Team& team, std::initializer_list<float*> sums = {}) const {
    for (size_t i = 0; i < products_.size(); i++) {
      const Product& op = products_[i];
      float* to = sums.size() ? sums.begin()[i] : nullptr;
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t n0 = 0; n0 < op.N; n0 += kAtOnce * kTileColumns) {
        pack_panels(panels(i) + n0 * op.K, op, n0);
        for (int64_t n = n0; to && n < std::min(op.N, n0 + kAtOnce * kTileColumns); n += kTileColumns)
          sum_panel(to + n, panels(i) + n * op.K, op.K, std::min(kTileColumns, op.N - n));
      }
    }
    team.wait();
  }

  // Rows m0 … of product i.
  void rows(int i, int64_t m0, int64_t rows) const {
    block<false>(products_[i], panels(i), m0, rows, 0, products_[i].N);
  }

  // All products whose a lies in columns, by all threads of a team, in blocks of `width` columns, or fewer where that
  // leaves not enough for everybody.
  void transposed(int64_t width) const {
    const auto blocks = [&](const Product& op) { return ceil_div(op.M, kTall) * ceil_div(op.N, width); };
    const auto all = [&] {
      int64_t count = 0;
      for (const Product& op : products_) count += blocks(op);
      return count;
    };
    while (width > 4 * kTileColumns && all() < 4 * omp_get_num_threads()) width /= 2;
    for (size_t i = 0; i < products_.size(); i++) {
      const Product& op = products_[i];
      const int64_t across = ceil_div(op.N, width);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t at = 0; at < blocks(op); at++) {
        const int64_t m0 = at / across * kTall, n0 = at % across * width;
        block<true>(op, panels(i), m0, std::min(kTall, op.M - m0), n0, std::min(width, op.N - n0));
      }
    }
  }

 private:
  static constexpr int64_t kTall = 132;  // rows of a block of a matrix's gradient: whole tiles
  float* panels(size_t i) const { return memory_ + starts_[i]; }

  std::vector<Product> products_;
  std::vector<int64_t> starts_;
  float* memory_;
};

// Rows m0 … normalised; statistics (2, N).
void norm_forward(float* y, float* statistics, const float* x, const Norm& norm, int64_t N, int64_t C, float epsilon,
                  int64_t m0, int64_t rows) {
  LayerNormFwd op{};
  op.y = y + m0 * C, op.mean = statistics + m0, op.rstd = statistics + N + m0, op.x = x + m0 * C, op.stride_xn = C;
  op.weight = norm.w, op.bias = norm.b, op.N = rows, op.C = C, op.epsilon = epsilon;
  layer_norm_fwd(op, 1);
}

// Rows m0 …: dx = ds + the gradient of the norm of x by x; what kRows of them add to those of its weight and bias goes to
// sums (blocks, 2, C).
void norm_backward(float* dx, float* sums, float* scratch, const float* dy, const float* ds, const float* x,
                   const Norm& norm, const float* statistics, int64_t N, int64_t C, int64_t m0, int64_t rows) {
  for (int64_t m = m0; m < m0 + rows; m += kRows) {
    LayerNormBwd op{};
    op.dx = dx + m * C, op.count = 2, op.sums = sums + m / kRows * 2 * C, op.scratch = scratch + m / kRows * 4 * C;
    op.dy = dy + m * C, op.stride_dyn = C, op.ds = ds + m * C, op.stride_dsn = C, op.s = x + m * C, op.stride_sn = C;
    op.weight = norm.w, op.mean = statistics + m, op.rstd = statistics + N + m;
    op.N = std::min(kRows, m0 + rows - m), op.C = C;
    layer_norm_bwd(op, 1);
  }
}

// to (width,) = the sum of sums (blocks, width), in order.
void add_up(float* to, const float* sums, int64_t blocks, int64_t width) {
  std::fill_n(to, width, 0.0f);
  for (int64_t i = 0; i < blocks; i++)
    for (int64_t c = 0; c < width; c++) to[c] += sums[i * width + c];
}

// body(m0, rows) for all rows of N, shared out among the threads of a team: at first `most` kRows of them, so that a panel
// is fetched for many, in the end one, so that all come to an end together.
template <class Body>
void for_rows(int64_t N, int64_t most, Body&& body) {
  std::vector<int64_t> starts{0};
  for (const int64_t units = ceil_div(N, kRows), threads = omp_get_num_threads(); starts.back() < units;)
    starts.push_back(starts.back() + std::clamp((units - starts.back()) / (2 * threads), int64_t(1), most));
#pragma omp for schedule(dynamic, 1) nowait
  for (size_t i = 0; i < starts.size() - 1; i++)
    body(starts[i] * kRows, std::min(starts[i + 1] * kRows, N) - starts[i] * kRows);
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

// One block, L being 1.
void forward_of(const Gpt2BlocksFwd& op, int threads) {
  const int64_t N = op.B * op.T, C = op.H * op.D, blocks = ceil_div(N, kRows);
  const Parts parts(op.weights, C, op.F);
  Product proj = forward(op.s, op.o, parts.proj, N), up = forward(op.slope, op.h2, parts.up, N);
  Product down = forward(op.y, op.g, parts.down, N);
  proj.residual = op.x, up.gelu = op.g, down.residual = op.s;
  const Packed products{forward(op.qkv, op.h1, parts.qkv, N), proj, up, down};

  in_team(threads, blocks, [&](Team& team) {
    products.pack(team);
    for_rows(N, op.cut_rows, [&](int64_t m0, int64_t rows) {
      norm_forward(op.h1, op.statistics, op.x, parts.ln_1, N, C, op.epsilon, m0, rows);
      products.rows(0, m0, rows);
    });
  });
  attention_fwd(attention_of<AttentionFwd>(op), threads);
  in_team(threads, blocks, [&](Team&) {
    for_rows(N, op.cut_rows, [&](int64_t m0, int64_t rows) {
      products.rows(1, m0, rows);
      norm_forward(op.h2, op.statistics + 2 * N, op.s, parts.ln_2, N, C, op.epsilon, m0, rows);
      products.rows(2, m0, rows);
      products.rows(3, m0, rows);
    });
  });
}

void backward_of(const Gpt2BlocksBwd& op, int threads) {
  const int64_t N = op.B * op.T, C = op.H * op.D, F = op.F, blocks = ceil_div(N, kRows);
  const Parts parts(op.weights, C, F);
  float *du = op.scratch, *dh = du + N * F, *ds = dh + N * C, *dqkv = ds + N * C, *d_o = dqkv + 3 * N * C;
  float *delta = d_o + N * C, *sums_1 = delta + op.B * op.H * op.T, *sums_2 = sums_1 + blocks * 2 * C;
  float* norm_scratch = sums_2 + blocks * 2 * C;  // (blocks, 2, 2, C)
  static_assert(kRows <= 2 * kColumnRows);
  float *d_ln_1 = op.gradients, *d_qkv = d_ln_1 + 2 * C, *d_proj = d_qkv + (C + 1) * 3 * C;
  float *d_ln_2 = d_proj + (C + 1) * C, *d_up = d_ln_2 + 2 * C, *d_down = d_up + (C + 1) * F;

  {
    Product down = backward(du, op.dy, parts.down, N);
    down.factor = op.slope;
    const Packed products{down, backward(dh, du, parts.up, N), backward(d_o, ds, parts.proj, N),
                          backward(dh, dqkv, parts.qkv, N)};
    in_team(threads, blocks, [&](Team& team) {
      products.pack(team);
      for_rows(N, op.cut_rows, [&](int64_t m0, int64_t rows) {
        products.rows(0, m0, rows);
        products.rows(1, m0, rows);
        norm_backward(ds, sums_2, norm_scratch, dh, op.dy, op.s, parts.ln_2, op.statistics + 2 * N, N, C, m0, rows);
        products.rows(2, m0, rows);
      });
    });
    AttentionBwd attention = attention_of<AttentionBwd>(op);
    attention.do_ = d_o, attention.stride_dob = op.T * C, attention.stride_dot = C, attention.stride_doh = op.D;
    attention.dq = dqkv, attention.dk = dqkv + C, attention.dv = dqkv + 2 * C, attention.delta = delta;
    attention.stride_dqt = attention.stride_dks = attention.stride_dvs = 3 * C;
    attention.stride_dqb = attention.stride_dkb = attention.stride_dvb = op.T * 3 * C;
    attention.stride_dqh = attention.stride_dkh = attention.stride_dvh = op.D;
    attention_bwd(attention, threads);
    in_team(threads, blocks, [&](Team&) {
      for_rows(N, op.cut_rows, [&](int64_t m0, int64_t rows) {
        products.rows(3, m0, rows);
        norm_backward(op.dx, sums_1, norm_scratch, dh, ds, op.x, parts.ln_1, op.statistics, N, C, m0, rows);
      });
    });
  }
  add_up(d_ln_1, sums_1, blocks, 2 * C);
  add_up(d_ln_2, sums_2, blocks, 2 * C);
  const Packed products{gradient(d_down, op.g, op.dy, parts.down, N), gradient(d_up, op.h2, du, parts.up, N),
                        gradient(d_qkv, op.h1, dqkv, parts.qkv, N), gradient(d_proj, op.o, ds, parts.proj, N)};
  in_team(threads, 2 * threads, [&](Team& team) {
    products.pack(team, {d_down + F * C, d_up + C * F, d_qkv + 3 * C * C, d_proj + C * C});
    products.transposed(op.cut_columns);
  });
}

// The tensors of block l alone; those that are a block's in and out are the caller's to set.
template <class Op>
Op block_of(const Op& op, int64_t l) {
  const int64_t N = op.B * op.T, C = op.H * op.D;
  Op one = op;
  one.h1 += l * N * C, one.qkv += l * N * 3 * C, one.o += l * N * C, one.lse += l * op.B * op.H * op.T;
  one.s += l * N * C, one.h2 += l * N * C, one.slope += l * N * op.F, one.g += l * N * op.F, one.statistics += l * 4 * N;
  one.weights += l * 12;
  if (l) one.x = op.between + (l - 1) * N * C;
  return one;
}

}  // namespace

void gpt2_blocks_fwd(const Gpt2BlocksFwd& op, int threads) {
  for (int64_t l = 0; l < op.L; l++) {
    Gpt2BlocksFwd one = block_of(op, l);
    if (l + 1 < op.L) one.y = op.between + l * op.B * op.T * op.H * op.D;
    forward_of(one, threads);
  }
}

void gpt2_blocks_bwd(const Gpt2BlocksBwd& op, int threads) {
  const int64_t C = op.H * op.D, rows = op.B * op.T * C, F = op.F;
  const int64_t weights = 4 * C + (C + 1) * 4 * C + (C + 1) * F + (F + 1) * C;  // of a block
  float* between[2] = {op.scratch, op.scratch + rows};
  for (int64_t l = op.L - 1; l >= 0; l--) {
    Gpt2BlocksBwd one = block_of(op, l);
    if (l + 1 < op.L) one.dy = between[(l + 1) % 2];
    if (l) one.dx = between[l % 2];
    one.gradients += l * weights, one.scratch += 2 * rows;
    backward_of(one, threads);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
