// The newest tokens of some sequences through a whole GPT-2, on the CPU, in one call.
//
//   x = wte[token] + wpe[position]
//   L × [x += proj(attend(qkv(ln_1(x))));  x += down(gelu(up(ln_2(x))))]        products with packed weights (panel.h)
//   logits = ln_f(x[last]) wte^T
//
// Rows are the new tokens of all sequences, one below the other. The work is a row of phases, each cut into chunks that
// the threads take one by one (phases.h).
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "panel.h"
#include "phases.h"
#include "running.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kPanelsAtOnce = 8;  // read side by side where rows are few: more streams, more bandwidth

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

inline void write_row(int8_t* to, float* scale, const float* row, int64_t K) {
  float largest = 0.0f;
  for (int64_t k = 0; k < K; k++) largest = std::max(largest, std::fabs(row[k]));
  *scale = largest / 127.0f;
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  for (int64_t k = 0; k < K; k++) to[k] = int8_t(std::nearbyintf(row[k] * inverse));
}

// The same, with zeros up to the end of the last group of k.
template <class W>
void write_whole_row(const Acts& acts, int64_t m, const float* row, int64_t K) {
  typename W::Act* to = acts.row<W>(m);
  write_row(to, acts.scale + m, row, K);
  const int64_t end = up(K, W::kGroup);
  std::fill(to + K, to + end, typename W::Act{});
  if constexpr (std::is_same_v<W, Int4Weights>) {
    for (int64_t g = 0; g < end / W::kGroup; g++) {
      int32_t total = 0;
      for (int64_t k = 0; k < W::kGroup; k++) total += to[g * W::kGroup + k];
      std::memcpy(to + end + 4 * g, &total, 4);
    }
  }
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
    case Weights::int4: return write_whole_row<Int4Weights>(acts, m, row, K);
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
template <class W, int rows, int panels, bool fetch = true>
void tile(const Packed& packed, const Acts& acts, int64_t m0, int64_t p0, const Output& out) {
  const int64_t bytes = up(packed.K, W::kGroup) / W::kGroup * W::kGroupBytes;  // a panel
  const int64_t ld = acts.ld / int64_t(sizeof(typename W::Act));
  typename W::Sum sums[rows][panels * kParts];
  product_of_panels<W, rows, panels, fetch>(sums, packed.w + p0 * bytes, bytes, acts.row<W>(m0), ld);
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
        y = std::is_same_v<W, Int4Weights> ? sums[m][v] * acts.scale[m0 + m] : sums[m][v];
      }
      out.take(m0 + m, n, packed.bias ? y + load(packed.bias + n) : y);
    }
}

// All rows with `panels` panels; what was read once stays in the caches for the next rows.
template <class W, int panels>
void tiles(const Packed& packed, const Acts& acts, int64_t M, int64_t p0, const Output& out) {
  if constexpr (panels <= 2) {
    int64_t m = 0;
    if (m + 8 <= M) tile<W, 8, panels>(packed, acts, m, p0, out), m += 8;
    for (; m + 8 <= M; m += 8) tile<W, 8, panels, false>(packed, acts, m, p0, out);
    if (m + 4 <= M) tile<W, 4, panels>(packed, acts, m, p0, out), m += 4;
    if (m + 2 <= M) tile<W, 2, panels>(packed, acts, m, p0, out), m += 2;
    if (m < M) tile<W, 1, panels>(packed, acts, m, p0, out);
  } else if (M == 1) {
    tile<W, 1, panels>(packed, acts, 0, p0, out);
  } else {
    tile<W, 2, panels>(packed, acts, 0, p0, out);
    if (M == 3) tile<W, 1, panels, false>(packed, acts, 2, p0, out);
  }
}

template <class W>
void product(Walk& walk, const Packed& packed, const Acts& acts, int64_t M, const Output& out, int threads) {
  const int64_t panels = (packed.N + kPanel - 1) / kPanel;
  const int64_t most = M < 4 ? kPanelsAtOnce : 2;  // that one reading of the activations serves
  int64_t chunk = kPanelsAtOnce;
  while (chunk > 1 && panels / chunk < 3 * threads) chunk /= 2;  // enough for everybody
  walk.run((panels + chunk - 1) / chunk, [&](int64_t i) {
    const int64_t end = std::min(panels, (i + 1) * chunk);
    for (int64_t p = i * chunk; p < end;) {
      const int64_t left = std::min(end - p, most);
      if (left >= 8) tiles<W, 8>(packed, acts, M, p, out), p += 8;
      else if (left >= 4) tiles<W, 4>(packed, acts, M, p, out), p += 4;
      else if (left >= 2) tiles<W, 2>(packed, acts, M, p, out), p += 2;
      else tiles<W, 1>(packed, acts, M, p, out), p += 1;
    }
  });
}

// One phase: the product of M rows.
void product(Walk& walk, Weights weights, const Packed& packed, const Acts& acts, int64_t M, const Output& out,
             int threads) {
  switch (weights) {
    case Weights::f32: return product<F32Weights>(walk, packed, acts, M, out, threads);
    case Weights::bf16: return product<Bf16Weights>(walk, packed, acts, M, out, threads);
    case Weights::int8: return product<Int8Weights>(walk, packed, acts, M, out, threads);
    case Weights::int4: return product<Int4Weights>(walk, packed, acts, M, out, threads);
  }
}

// ---- the step

// A new token: its sequence and its position.
struct Row {
  int64_t b, position;
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
  std::vector<int64_t> lasts;  // the rows whose logits are wanted,
  std::vector<int64_t> ends;   // and where they go
  std::vector<int64_t> tokens;
  for (int64_t b = 0; b < op.B; b++)
    for (int64_t t = 0; t < op.counts[b]; t++) {
      if (op.every || t + 1 == op.counts[b]) {
        lasts.push_back(int64_t(rows.size()));
        ends.push_back(op.every ? int64_t(rows.size()) : b);
      }
      rows.push_back({b, op.positions[b] + t});
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
  const bool scattered = !op.every && E < op.B;  // some sequences wait
  std::vector<float> apart(scattered ? E * Vp : 0);
  float* logits = scattered ? apart.data() : op.logits;
  const T *wte = static_cast<const T*>(op.wte), *wpe = static_cast<const T*>(op.wpe);
  const float scale = 1.0f / std::sqrt(float(op.D));
  Phases phases(op.L * 12 + 4, threads);

#pragma omp parallel num_threads(threads)
  {
    Walk walk(phases, omp_get_thread_num());
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
      product(walk, op.weights, qkv_w, acts, M, {qkv, Qp, Then::store}, threads);
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
      product(walk, op.weights, proj_w, acts, M, {x, Cp, Then::add}, threads);
      walk.run(M, [&](int64_t m) {
        normalise(normed, x + m * Cp, ln_2_w, ln_2_b, C, op.epsilon);
        write_row(acts, op.weights, m, normed, C);
      });
      product(walk, op.weights, up_w, acts, M, {f, Fp, Then::gelu}, threads);
      walk.run(M, [&](int64_t m) { write_row(acts, op.weights, m, f + m * Fp, F); });
      product(walk, op.weights, down_w, acts, M, {x, Cp, Then::add}, threads);
    }
    walk.run(E, [&](int64_t e) {
      normalise(normed, x + lasts[e] * Cp, op.ln_f_w, op.ln_f_b, C, op.epsilon);
      write_row(acts, op.head_weights, e, normed, C);
    });
    const Packed head{op.head, nullptr, op.head_scale, op.head_sums, C, op.V};
    product(walk, op.head_weights, head, acts, E, {logits, Vp, Then::store}, threads);
  }
  for (int64_t e = 0; e < (scattered ? E : 0); e++) std::copy_n(logits + e * Vp, Vp, op.logits + ends[e] * Vp);
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
