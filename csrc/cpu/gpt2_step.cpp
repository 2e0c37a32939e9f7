// The newest tokens of some sequences through a whole GPT-2, on the CPU, in one call.
//
//   x = wte[token] + wpe[position]
//   L × [x += proj(attend(qkv(ln_1(x))));  x += down(gelu(up(ln_2(x))))]        products with packed weights (panel.h)
//   logits = ln_f(x[last]) wte^T
//
// Rows are the new tokens of all sequences, one below the other. The work is a row of phases, each cut into chunks that
// the threads take one by one (phases.h).
#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "panel.h"
#include "phases.h"
#include "running.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int kRowsAtOnce = 8;  // rows that share one reading of two panels

inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A packed matrix (K, N) with its bias; scales and sums are those of int8.
struct Packed {
  const char* w;        // panels
  const float* bias;    // (up(N, kPanel),), or null
  const float* scale;   // (up(N, kPanel),), or null
  const int32_t* sums;  // (up(N, kPanel),), sum over k of w
  int64_t K, N;
};

// Rows of activations as the weights take them: (rows, ld bytes), with a scale a row for int8.
struct Acts {
  char* x;
  float* scale;
  int64_t ld;

  template <class W>
  typename W::Act* row(int64_t m) const { return reinterpret_cast<typename W::Act*>(x + m * ld); }
};

// ---- one row into activations

inline void write_row(float* to, float*, const float* row, int64_t K) { std::memcpy(to, row, 4 * K); }

inline void write_row(Bf16* to, float*, const float* row, int64_t K) {
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) store(to + k, load(row + k));
  for (; k < K; k++) to[k] = from_float<Bf16>(row[k]);
}

inline void write_row(uint8_t* to, float* scale, const float* row, int64_t K) {
  float largest = 0.0f;
  for (int64_t k = 0; k < K; k++) largest = std::max(largest, std::fabs(row[k]));
  *scale = largest / 127.0f;
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  for (int64_t k = 0; k < K; k++) to[k] = uint8_t(int32_t(std::nearbyintf(row[k] * inverse)) + 128);
}

// The same, with zeros up to the end of the last group of k.
template <class W>
void write_whole_row(const Acts& acts, int64_t m, const float* row, int64_t K) {
  typename W::Act* to = acts.row<W>(m);
  write_row(to, acts.scale + m, row, K);
  std::fill(to + K, to + up(K, W::kGroup), typename W::Act{});
}

// (row - mean) / sqrt(variance + epsilon) · w + b, (C,)
inline void normalise(float* to, const float* row, const float* w, const float* b, int64_t C, float epsilon) {
  Floats total{}, squares{};
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) total += load(row + c);
  float mean = sum(total);
  for (; c < C; c++) mean += row[c];
  mean /= float(C);
  for (c = 0; c + kLanes <= C; c += kLanes) {
    const Floats d = load(row + c) - mean;
    squares += d * d;
  }
  float variance = sum(squares);
  for (; c < C; c++) variance += (row[c] - mean) * (row[c] - mean);
  const float rstd = 1.0f / std::sqrt(variance / float(C) + epsilon);
  for (c = 0; c + kLanes <= C; c += kLanes) store(to + c, (load(row + c) - mean) * rstd * load(w + c) + load(b + c));
  for (; c < C; c++) to[c] = (row[c] - mean) * rstd * w[c] + b[c];
}

// gelu(x) = x σ(2 √(2/π) (x + 0.044715 x³)), the tanh form
inline Floats gelu(Floats x) {
  const Floats z = x * (x * x * 0.044715f + 1.0f) * -1.5957691216f;
  return x / (exp(select(z > 80.0f, broadcast(80.0f), z)) + 1.0f);
}

// Row m of the activations from fp32 (K,).
void write_row(const Acts& acts, Weights weights, int64_t m, const float* row, int64_t K) {
  switch (weights) {
    case Weights::f32: return write_whole_row<F32Weights>(acts, m, row, K);
    case Weights::bf16: return write_whole_row<Bf16Weights>(acts, m, row, K);
    case Weights::int8: return write_whole_row<Int8Weights>(acts, m, row, K);
  }
}

// ---- products

// What becomes of a product's values: out = y, out += y, out = gelu(y).
enum class Then { store, add, gelu };

struct Output {
  float* rows;  // (M, ld), N rounded up to two panels wide
  int64_t ld;
  Then then;

  void take(int64_t m, int64_t n, Floats y) const {
    float* to = rows + m * ld + n;
    store(to, then == Then::add ? load(to) + y : then == Then::gelu ? gelu(y) : y);
  }
};

// Rows m0 … of the product with `panels` panels from p0 on.
template <class W, int rows, int panels>
void tile(const Packed& packed, const Acts& acts, int64_t m0, int64_t p0, const Output& out) {
  const int64_t K = up(packed.K, W::kGroup), bytes = K / W::kGroup * 4 * kPanel;
  typename W::Sum sums[rows][panels * kParts];
  const int64_t ld = acts.ld / int64_t(sizeof(typename W::Act));
  product_of_panels<W, rows, panels>(sums, packed.w + p0 * bytes, bytes, acts.row<W>(m0), ld, K);
  for (int m = 0; m < rows; m++)
    for (int v = 0; v < panels * kParts; v++) {
      const int64_t n = p0 * kPanel + v * kLanes;
      Floats y;
      if constexpr (std::is_same_v<W, Int8Weights>) {
        Ints sum_w;
        std::memcpy(&sum_w, packed.sums + n, sizeof sum_w);
        const Ints exact = sums[m][v] - (sum_w << 7);  // the bytes are x + 128
        y = __builtin_convertvector(exact, Floats) * (load(packed.scale + n) * acts.scale[m0 + m]);
      } else {
        y = sums[m][v];
      }
      out.take(m0 + m, n, packed.bias ? y + load(packed.bias + n) : y);
    }
}

template <class W, int panels>
void tiles(const Packed& packed, const Acts& acts, int64_t M, int64_t p0, const Output& out) {
  int64_t m = 0;
  for (; m + kRowsAtOnce <= M; m += kRowsAtOnce) tile<W, kRowsAtOnce, panels>(packed, acts, m, p0, out);
  if (m + 4 <= M) tile<W, 4, panels>(packed, acts, m, p0, out), m += 4;
  if (m + 2 <= M) tile<W, 2, panels>(packed, acts, m, p0, out), m += 2;
  if (m < M) tile<W, 1, panels>(packed, acts, m, p0, out);
}

template <class W>
void product(Walk& walk, const Packed& packed, const Acts& acts, int64_t M, const Output& out) {
  const int64_t panels = (packed.N + kPanel - 1) / kPanel;
  walk.run((panels + 1) / 2, [&](int64_t i) {
    if (2 * i + 1 < panels) tiles<W, 2>(packed, acts, M, 2 * i, out);
    else tiles<W, 1>(packed, acts, M, 2 * i, out);
  });
}

// One phase: the product of M rows.
void product(Walk& walk, Weights weights, const Packed& packed, const Acts& acts, int64_t M, const Output& out) {
  switch (weights) {
    case Weights::f32: return product<F32Weights>(walk, packed, acts, M, out);
    case Weights::bf16: return product<Bf16Weights>(walk, packed, acts, M, out);
    case Weights::int8: return product<Int8Weights>(walk, packed, acts, M, out);
  }
}

// ---- the step

// A new token: its sequence and its position.
struct Row {
  int64_t b, position;
  bool last;  // of its sequence
};

Packed packed_at(const int64_t*& p, int64_t K, int64_t N) {
  Packed packed{reinterpret_cast<const char*>(p[0]), reinterpret_cast<const float*>(p[1]),
                reinterpret_cast<const float*>(p[2]), reinterpret_cast<const int32_t*>(p[3]), K, N};
  p += 4;
  return packed;
}

template <class T>
void step(const Gpt2Step& op, int threads) {
  const int64_t C = op.H * op.D, F = op.inner;
  std::vector<Row> rows;
  std::vector<int64_t> lasts;  // row of each sequence's last new token, in the order of `ends`
  std::vector<int64_t> ends;   // its sequence
  std::vector<int64_t> tokens;
  for (int64_t b = 0; b < op.B; b++)
    for (int64_t t = 0; t < op.counts[b]; t++) {
      const bool last = t + 1 == op.counts[b];
      if (last) lasts.push_back(int64_t(rows.size())), ends.push_back(b);
      rows.push_back({b, op.positions[b] + t, last});
      tokens.push_back(op.tokens[b * op.T + t]);
    }
  const int64_t M = int64_t(rows.size()), E = int64_t(lasts.size());
  if (!M) return;
  const int64_t Cp = up(C, 2 * kPanel), Qp = up(3 * C, 2 * kPanel), Fp = up(F, 2 * kPanel), Vp = up(op.V, 2 * kPanel);
  const int64_t widest = std::max(Cp, Fp);
  std::vector<float> floats(M * (2 * Cp + Qp + Fp) + 2 * M + 64);
  float* x = floats.data();                               // (M, Cp) residual
  float *qkv = x + M * Cp, *o = qkv + M * Qp, *f = o + M * Cp, *row_scales = f + M * Fp;
  std::vector<char> act_bytes(M * widest * 4 + 64);  // as wide as fp32, so that a group of k ends inside
  const Acts acts{act_bytes.data(), row_scales, widest * 4};
  std::vector<float> apart(E < op.B ? E * Vp : 0);  // where some sequences wait
  float* logits = E < op.B ? apart.data() : op.logits;
  const T *wte = static_cast<const T*>(op.wte), *wpe = static_cast<const T*>(op.wpe);
  const float scale = 1.0f / std::sqrt(float(op.D));
  Phases phases(op.L * 12 + 4);

#pragma omp parallel num_threads(threads)
  {
    Walk walk(phases);
    thread_local std::vector<float> kept;
    kept.resize(widest + 4 * up(op.D, kLanes));
    float* normed = kept.data();

    walk.run(M, [&](int64_t m) {
      const T *token = wte + tokens[m] * C, *place = wpe + rows[m].position * C;
      for (int64_t c = 0; c < C; c++) x[m * Cp + c] = to_float(token[c]) + to_float(place[c]);
    });
    const int64_t* p = op.layers;
    for (int64_t layer = 0; layer < op.L; layer++) {
      const float *ln_1_w = reinterpret_cast<const float*>(p[0]), *ln_1_b = reinterpret_cast<const float*>(p[1]);
      const float *ln_2_w = reinterpret_cast<const float*>(p[2]), *ln_2_b = reinterpret_cast<const float*>(p[3]);
      T *k_pages = reinterpret_cast<T*>(p[4]), *v_pages = reinterpret_cast<T*>(p[5]);
      p += 6;
      const Packed qkv_w = packed_at(p, C, 3 * C), proj_w = packed_at(p, C, C);
      const Packed up_w = packed_at(p, C, F), down_w = packed_at(p, F, C);

      walk.run(M, [&](int64_t m) {
        normalise(normed, x + m * Cp, ln_1_w, ln_1_b, C, op.epsilon);
        write_row(acts, op.weights, m, normed, C);
      });
      product(walk, op.weights, qkv_w, acts, M, {qkv, Qp, Then::store});
      walk.run(M, [&](int64_t m) {  // appends k and v
        const Row row = rows[m];
        const int64_t page = op.block_table[row.b * op.max_pages + row.position / op.page];
        const int64_t at = (page * op.page + row.position % op.page) * C;
        for (int64_t c = 0; c < C; c++) {
          k_pages[at + c] = from_float<T>(qkv[m * Qp + C + c]);
          v_pages[at + c] = from_float<T>(qkv[m * Qp + 2 * C + c]);
        }
      });
      walk.run(M * op.H, [&](int64_t mh) {
        const int64_t m = mh / op.H, h = mh % op.H, length = rows[m].position + 1, Dp = up(op.D, kLanes);
        float *q = kept.data() + widest, *sums = q + Dp;
        std::fill(q, q + 2 * Dp, 0.0f);
        for (int64_t d = 0; d < op.D; d++) q[d] = qkv[m * Qp + h * op.D + d] * scale;
        Running state;
        const int32_t* table = op.block_table + rows[m].b * op.max_pages;
        for (int64_t s0 = 0; s0 < length;) {
          const int64_t slot = s0 % op.page, run = std::min({kRun, op.page - slot, length - s0});
          const int64_t at = (table[s0 / op.page] * op.page + slot) * C + h * op.D;
          float scores[kRun];
          for (int64_t j = 0; j < run; j++) scores[j] = dot(q, k_pages + at + j * C, op.D);
          take(state, sums, scores, run, v_pages + at, C, op.D);
          s0 += run;
        }
        for (int64_t d = 0; d < op.D; d++) o[m * Cp + h * op.D + d] = sums[d] / state.l;
      });
      walk.run(M, [&](int64_t m) { write_row(acts, op.weights, m, o + m * Cp, C); });
      product(walk, op.weights, proj_w, acts, M, {x, Cp, Then::add});
      walk.run(M, [&](int64_t m) {
        normalise(normed, x + m * Cp, ln_2_w, ln_2_b, C, op.epsilon);
        write_row(acts, op.weights, m, normed, C);
      });
      product(walk, op.weights, up_w, acts, M, {f, Fp, Then::gelu});
      walk.run(M, [&](int64_t m) { write_row(acts, op.weights, m, f + m * Fp, F); });
      product(walk, op.weights, down_w, acts, M, {x, Cp, Then::add});
    }
    walk.run(E, [&](int64_t e) {
      normalise(normed, x + lasts[e] * Cp, op.ln_f_w, op.ln_f_b, C, op.epsilon);
      write_row(acts, op.head_weights, e, normed, C);
    });
    const Packed head{op.head, nullptr, op.head_scale, op.head_sums, C, op.V};
    product(walk, op.head_weights, head, acts, E, {logits, Vp, Then::store});
  }
  for (int64_t e = 0; e < E; e++)
    if (logits != op.logits) std::copy_n(logits + e * Vp, Vp, op.logits + ends[e] * Vp);
}

}  // namespace

void gpt2_step(const Gpt2Step& op, int threads) {
  switch (op.dtype) {
    case DType::f32: return step<float>(op, threads);
    case DType::bf16: return step<Bf16>(op, threads);
    case DType::f16: return step<Fp16>(op, threads);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
