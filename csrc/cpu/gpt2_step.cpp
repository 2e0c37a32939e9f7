// The newest tokens of some sequences through a whole GPT-2, on the CPU, in one call.
//
//   x = wte[token] + wpe[position]
//   L × [x += proj(attend(qkv(ln_1(x))));  x += down(gelu(up(ln_2(x))))]        products with packed weights (panel.h)
//   logits = ln_f(x[last]) wte^T;  the next token is drawn, where that is asked for                              draw.h
//
// Rows are the new tokens of all sequences, one below the other. The work is a row of phases, each cut into chunks that
// the threads take one by one (phases.h).
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "acts.h"
#include "draw.h"
#include "gelu.h"
#include "isa.h"
#include "phases.h"
#include "running.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kPanelsAtOnce = 8;  // read side by side where rows are few: more streams, more bandwidth

// Rows and panels of the tiles of many rows: their sums fill the vector registers.
#if defined(__AVX512F__)
constexpr int kManyRows = 8, kPanelsOfMany = 2;
#else
constexpr int kManyRows = kParts == 2 ? 6 : 3, kPanelsOfMany = 1;
#endif

// Bytes of activations that go through all panels of a chunk before the next rows do: they stay in the second-level cache.
constexpr int64_t kBlockBytes = 96 << 10;

// Activations of as many rows or fewer every thread makes for itself: to wait for another's would take longer.
constexpr int64_t kOwn = 4;

// A packed matrix (K, N) with its bias; scales and sums are those of int8.
struct Packed {
  const char* w;        // panels
  const float* bias;    // (up(N, kPanel),), or null
  const float* scale;   // (up(N, kPanel),), or null
  const int32_t* sums;  // (up(N, kPanel),), sum over k of w
  int64_t K, N;
};

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
        Ints exact = sums[m][v];
        if constexpr (std::is_unsigned_v<typename W::Act>) {  // the bytes are x + 128
          Ints sum_w;
          std::memcpy(&sum_w, packed.sums + n, sizeof sum_w);
          exact -= sum_w << 7;
        }
        y = __builtin_convertvector(exact, Floats) * (load(packed.scale + n) * acts.scale[m0 + m]);
      } else {
        y = std::is_same_v<W, Int4Weights> ? sums[m][v] * acts.scale[m0 + m] : sums[m][v];
      }
      out.take(m0 + m, n, packed.bias ? y + load(packed.bias + n) : y);
    }
}

// Rows m … M with `panels` panels; what was read once stays in the caches for the next rows.
template <class W, int panels>
void tiles(const Packed& packed, const Acts& acts, int64_t m, int64_t M, int64_t p0, const Output& out) {
  if constexpr (panels <= kPanelsOfMany) {
    if (m + kManyRows <= M) tile<W, kManyRows, panels>(packed, acts, m, p0, out), m += kManyRows;
    for (; m + kManyRows <= M; m += kManyRows) tile<W, kManyRows, panels, false>(packed, acts, m, p0, out);
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

template <class W, class Prepare>
void product(Walk& walk, const Packed& packed, const Acts& acts, int64_t M, const Output& out, int threads,
             Prepare&& prepare) {
  const int64_t panels = (packed.N + kPanel - 1) / kPanel;
  const int64_t most = M < 4 ? kPanelsAtOnce : kPanelsOfMany;  // that one reading of the activations serves
  int64_t chunk = kPanelsAtOnce;
  while (chunk > 1 && panels / chunk < 3 * threads) chunk /= 2;  // enough for everybody
  const int64_t row_bytes = packed.K * int64_t(sizeof(typename W::Act));
  const int64_t block = up(std::max(kBlockBytes / row_bytes, int64_t(1)), kManyRows);
  bool ready = false;
  walk.run((panels + chunk - 1) / chunk, [&](int64_t i) {
    if (!ready) prepare(), ready = true;
    const int64_t end = std::min(panels, (i + 1) * chunk);
    for (int64_t m = 0; m < M; m += block) {
      const int64_t to = std::min(M, m + block);
      for (int64_t p = i * chunk; p < end;) {
        const int64_t left = std::min(end - p, most);
        if (left >= 8) tiles<W, 8>(packed, acts, m, to, p, out), p += 8;
        else if (left >= 4) tiles<W, 4>(packed, acts, m, to, p, out), p += 4;
        else if (left >= 2) tiles<W, 2>(packed, acts, m, to, p, out), p += 2;
        else tiles<W, 1>(packed, acts, m, to, p, out), p += 1;
      }
    }
  });
}

// One phase: the product of M rows. A thread calls prepare() before its first chunk.
template <class Prepare>
void product(Walk& walk, Weights weights, const Packed& packed, const Acts& acts, int64_t M, const Output& out,
             int threads, Prepare&& prepare) {
  switch (weights) {
    case Weights::f32: return product<F32Weights>(walk, packed, acts, M, out, threads, prepare);
    case Weights::bf16: return product<Bf16Weights>(walk, packed, acts, M, out, threads, prepare);
    case Weights::int8: return product<Int8Weights>(walk, packed, acts, M, out, threads, prepare);
    case Weights::int4: return product<Int4Weights>(walk, packed, acts, M, out, threads, prepare);
  }
}

// ---- the step

// A prompt of as many tokens or more is attended to in tiles.
constexpr int64_t kPrompt = 16;

template <class T>
class Step {
 public:
  Step(const Gpt2Step& op, int threads)
      : op_(op), threads_(threads), C_(op.H * op.D), F_(op.inner), Cp_(up(C_, 2 * kPanel)),
        Qp_(up(3 * C_, 2 * kPanel)), Fp_(up(F_, 2 * kPanel)), Vp_(up(op.V, 2 * kPanel)),
        widest_(std::max(Cp_, Fp_)), phases_(op.L * 12 + 4, threads) {
    for (int64_t b = 0; b < op.B; b++) {
      const bool tiled = op.counts[b] >= kPrompt && !op.positions[b];
      if (op.counts[b]) sequences_.push_back({b, int64_t(rows_.size()), op.counts[b], tiled});
      some_tiled_ |= tiled;
      for (int64_t t = 0; t < op.counts[b]; t++) {
        const int64_t row = int64_t(rows_.size());
        if (op.every || t + 1 == op.counts[b]) wanted_.push_back(row), places_.push_back(op.every ? row : b);
        rows_.push_back({op.positions[b] + t, op.tokens[b * op.T + t]});
      }
    }
    M_ = int64_t(rows_.size()), E_ = int64_t(wanted_.size());
  }

  void run() {
    if (M_) compute();
    for (int64_t b = 0; b < op_.B; b++) op_.positions[b] += op_.counts[b];
    if (op_.ids) ++*op_.step;
  }

 private:
  void compute() {
    floats_.resize(M_ * (2 * Cp_ + Qp_ + Fp_) + 2 * M_);
    x_ = floats_.data(), qkv_ = x_ + M_ * Cp_, o_ = qkv_ + M_ * Qp_, f_ = o_ + M_ * Cp_;
    act_bytes_.resize(M_ * row_stride(Weights::f32, widest_));
    acts_ = {act_bytes_.data(), f_ + M_ * Fp_};
    const bool scattered = !op_.every && E_ < op_.B;  // some sequences wait
    std::vector<float> apart(scattered ? E_ * Vp_ : 0);
    float* logits = scattered ? apart.data() : op_.logits;

    if (!some_tiled_) {  // one region: its start would show in every token
      in_team([&](Walk& walk) {
        embed(walk);
        for (int64_t layer = 0; layer < op_.L; layer++) {
          attend(walk, layer);
          after_attention(walk, layer);
        }
        head(walk, logits);
      });
    } else {  // the tiled attention has a team of its own
      in_team([&](Walk& walk) { embed(walk); });
      for (int64_t layer = 0; layer < op_.L; layer++) {
        in_team([&](Walk& walk) { attend(walk, layer); });
        attend_to_prompts();
        in_team([&](Walk& walk) { after_attention(walk, layer); });
      }
      in_team([&](Walk& walk) { head(walk, logits); });
    }
    for (int64_t e = 0; e < (scattered ? E_ : 0); e++)
      std::copy_n(logits + e * Vp_, Vp_, op_.logits + places_[e] * Vp_);
  }

  // A new token: its position and its id.
  struct Row {
    int64_t position, token;
  };
  // The new tokens of sequence b: the first one's row, how many they are, whether their attention comes in tiles.
  struct Sequence {
    int64_t b, row, count;
    bool tiled;
  };
  struct Layer {
    const float *ln_1_w, *ln_1_b, *ln_2_w, *ln_2_b;
    T *k_pages, *v_pages;
    Packed qkv, proj, up, down;
  };

  template <class Body>
  void in_team(Body&& body) {
    const int64_t done = phases_done_;
#pragma omp parallel num_threads(threads_)
    {
      Walk walk(phases_, omp_get_thread_num(), done);
      body(walk);
#pragma omp single nowait
      phases_done_ = walk.phase();
    }
  }

  // A thread's scratch: a row of activations, then a query and its sum.
  float* scratch() const {
    thread_local std::vector<float> kept;
    return at_least(kept, widest_ + 2 * up(op_.D, kLanes));
  }

  // A thread's own activations, kOwn rows.
  Acts own() const {
    thread_local std::vector<float> kept;
    float* scales = at_least(kept, kOwn + kOwn * row_stride(Weights::f32, widest_) / 4);
    return {reinterpret_cast<char*>(scales + kOwn), scales};
  }

  static float* at_least(std::vector<float>& kept, int64_t size) {
    if (int64_t(kept.size()) < size) kept.resize(size);
    return kept.data();
  }

  Layer layer_at(int64_t layer) const {
    const int64_t* p = op_.layers + layer * 22;
    const auto floats = [&](int i) { return reinterpret_cast<const float*>(p[i]); };
    const auto packed = [&](int i, int64_t K, int64_t N) {
      return Packed{reinterpret_cast<const char*>(p[i]), floats(i + 1), floats(i + 2),
                    reinterpret_cast<const int32_t*>(p[i + 3]), K, N};
    };
    return {floats(0), floats(1), floats(2), floats(3), reinterpret_cast<T*>(p[4]), reinterpret_cast<T*>(p[5]),
            packed(6, C_, 3 * C_), packed(10, C_, C_), packed(14, C_, F_), packed(18, F_, C_)};
  }

  void embed(Walk& walk) {
    switch (op_.dtype) {
      case DType::f32: return embed<float>(walk);
      case DType::bf16: return embed<Bf16>(walk);
      case DType::f16: return embed<Fp16>(walk);
    }
  }

  template <class E>
  void embed(Walk& walk) {
    const E *wte = static_cast<const E*>(op_.wte), *wpe = static_cast<const E*>(op_.wpe);
    walk.run(M_, [&](int64_t m) {
      const E *token = wte + rows_[m].token * C_, *place = wpe + rows_[m].position * C_;
      for (int64_t c = 0; c < C_; c++) x_[m * Cp_ + c] = to_float(token[c]) + to_float(place[c]);
    });
  }

  // The product of M rows, of which row(m, scratch) gives the values.
  template <class MakeRow>
  void product_of(Walk& walk, Weights weights, const Packed& packed, int64_t M, const Output& out, MakeRow&& row) {
    const auto make = [&](const Acts& acts, int64_t m) {
      write_row(acts, weights, m, row(m, scratch()), packed.K);
    };
    Acts acts = M > kOwn ? acts_ : own();
    acts.ld = row_stride(weights, packed.K);
    if (M > kOwn) {
      walk.run(M, [&](int64_t m) { make(acts, m); });
      product(walk, weights, packed, acts, M, out, threads_, [] {});
    } else {
      product(walk, weights, packed, acts, M, out, threads_, [&] {
        for (int64_t m = 0; m < M; m++) make(acts, m);
      });
    }
  }

  // A row of x, normalised into `to`.
  const float* normalised(int64_t m, const float* w, const float* b, float* to) const {
    normalise(to, x_ + m * Cp_, w, b, C_, op_.epsilon);
    return to;
  }

  // qkv of every row; then a sequence's head after the other: its k and v are appended, and but for whole prompts its
  // new tokens attend to all that came before.
  void attend(Walk& walk, int64_t number) {
    const Layer layer = layer_at(number);
    product_of(walk, op_.weights, layer.qkv, M_, {qkv_, Qp_, Then::store},
               [&](int64_t m, float* to) { return normalised(m, layer.ln_1_w, layer.ln_1_b, to); });
    walk.run(int64_t(sequences_.size()) * op_.H, [&](int64_t i) {
      const Sequence& sequence = sequences_[i / op_.H];
      const int64_t h = i % op_.H, end = sequence.row + sequence.count;
      for (int64_t m = sequence.row; m < end; m++) {
        const int64_t at = place(sequence.b, h, rows_[m].position);
        const float* k = qkv_ + m * Qp_ + C_ + h * op_.D;
        copy(layer.k_pages + at, k), copy(layer.v_pages + at, k + C_);
      }
      for (int64_t m = sequence.row; m < end && !sequence.tiled; m++) attend(layer, sequence.b, m, h);
    });
  }

  // Where the head h of a position lies in the pages.
  int64_t place(int64_t b, int64_t h, int64_t position) const {
    const int64_t page = op_.block_table[b * op_.max_pages + position / op_.page];
    return page * op_.stride_p + position % op_.page * op_.stride_s + h * op_.stride_h;
  }

  void copy(T* to, const float* from) const {
    int64_t d = 0;
    for (; d + kLanes <= op_.D; d += kLanes) store(to + d, load(from + d));
    for (; d < op_.D; d++) to[d] = from_float<T>(from[d]);
  }

  // o of head h of row m, over the pages.
  void attend(const Layer& layer, int64_t b, int64_t m, int64_t h) const {
    const int64_t length = rows_[m].position + 1, Dp = up(op_.D, kLanes);
    const float scale = 1.0f / std::sqrt(float(op_.D));
    float *q = scratch() + widest_, *sums = q + Dp;
    std::fill(q, q + 2 * Dp, 0.0f);
    for (int64_t d = 0; d < op_.D; d++) q[d] = qkv_[m * Qp_ + h * op_.D + d] * scale;
    const auto rows = [&](const T* pages, int64_t s) {
      return Rows<T>{s < length ? pages + place(b, h, s) : nullptr, op_.stride_s};
    };
    Running state;
    for (int64_t s0 = 0; s0 < length;) {
      const int64_t run = std::min({kRun, op_.page - s0 % op_.page, length - s0});
      const Rows<T> v = rows(layer.v_pages, s0);
      float scores[kRun];
      score(scores, q, rows(layer.k_pages, s0), v, run, op_.D);
      take(state, sums, scores, run, v, rows(layer.k_pages, s0 + run), op_.D);
      s0 += run;
    }
    for (int64_t d = 0; d < op_.D; d++) o_[m * Cp_ + h * op_.D + d] = sums[d] / state.l;
  }

  // o of whole prompts, from qkv.
  void attend_to_prompts() {
    for (const Sequence& prompt : sequences_) {
      if (!prompt.tiled) continue;
      lse_.resize(op_.H * prompt.count);
      float *qkv = qkv_ + prompt.row * Qp_, *o = o_ + prompt.row * Cp_;
      AttentionFwd op{};
      op.o = o, op.stride_ot = Cp_, op.stride_oh = op_.D, op.lse = lse_.data();
      op.q = qkv, op.stride_qt = Qp_, op.stride_qh = op_.D;
      op.k = qkv + C_, op.stride_ks = Qp_, op.stride_kh = op_.D;
      op.v = qkv + 2 * C_, op.stride_vs = Qp_, op.stride_vh = op_.D;
      op.B = 1, op.T = op.S = prompt.count, op.H = op_.H, op.D = op_.D;
      op.causal = kBottomRight, op.scale = 1.0f / std::sqrt(float(op_.D)), op.dtype = DType::f32;
      attention_fwd(op, threads_);
    }
  }

  // The output's projection and the MLP, added to the residual.
  void after_attention(Walk& walk, int64_t number) {
    const Layer layer = layer_at(number);
    product_of(walk, op_.weights, layer.proj, M_, {x_, Cp_, Then::add},
               [&](int64_t m, float*) { return o_ + m * Cp_; });
    product_of(walk, op_.weights, layer.up, M_, {f_, Fp_, Then::gelu},
               [&](int64_t m, float* to) { return normalised(m, layer.ln_2_w, layer.ln_2_b, to); });
    product_of(walk, op_.weights, layer.down, M_, {x_, Cp_, Then::add},
               [&](int64_t m, float*) { return f_ + m * Fp_; });
  }

  // The logits, and the tokens drawn from them.
  void head(Walk& walk, float* logits) {
    const Packed packed{op_.head, nullptr, op_.head_scale, op_.head_sums, C_, op_.V};
    product_of(walk, op_.head_weights, packed, E_, {logits, Vp_, Then::store},
               [&](int64_t e, float* to) { return normalised(wanted_[e], op_.ln_f_w, op_.ln_f_b, to); });
    if (!op_.ids) return;
    const Sampling how{op_.temperature, op_.top_k, op_.top_p};
    walk.run(E_, [&](int64_t e) {
      const int64_t b = places_[e];
      op_.ids[b] = draw(logits + e * Vp_, op_.choices, how, op_.uniform[b * op_.stride_u + *op_.step]);
    });
  }

  const Gpt2Step& op_;
  const int threads_;
  const int64_t C_, F_, Cp_, Qp_, Fp_, Vp_, widest_;  // …p: rounded up to two panels
  Phases phases_;
  int64_t phases_done_ = 0;
  std::vector<Row> rows_;
  std::vector<Sequence> sequences_;
  bool some_tiled_ = false;
  std::vector<int64_t> wanted_, places_;  // the rows whose logits are wanted, and where they go
  int64_t M_ = 0, E_ = 0;                 // how many rows, how many of them wanted
  std::vector<float> floats_, lse_;
  std::vector<char> act_bytes_;
  float *x_ = nullptr, *qkv_ = nullptr, *o_ = nullptr, *f_ = nullptr;  // (M, Cp) residual, (M, Qp), (M, Cp), (M, Fp)
  Acts acts_{};                           // of the rows; as far apart as a product wants them
};

}  // namespace

void gpt2_step(const Gpt2Step& op, int threads) {
  switch (op.page_dtype) {
    case DType::f32: return Step<float>(op, threads).run();
    case DType::bf16: return Step<Bf16>(op, threads).run();
    case DType::f16: return Step<Fp16>(op, threads).run();
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
