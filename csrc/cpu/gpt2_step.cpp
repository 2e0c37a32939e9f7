// The newest tokens of some sequences through a whole GPT-2, on the CPU, in one call.
//
//   x = wte[token] + wpe[position]
//   L × [x += proj(attend(qkv(ln_1(x))));  x += down(gelu(up(ln_2(x))))]        products/packed.h
//   logits = ln_f(x[last]) wte^T;  the next token is drawn, where that is asked for                              draw.h
//
// Rows are the new tokens of all sequences, one below the other. The work is a row of phases, each cut into chunks that
// the threads take one by one (phases.h).
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "draw.h"
#include "isa.h"
#include "normalise.h"
#include "paged.h"
#include "products/cut.h"
#include "team.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// Activations of as many rows or fewer every thread makes for itself: to wait for another's would take longer.
constexpr int64_t kOwn = 4;

// A prompt of as many tokens or more is attended to in tiles.
constexpr int64_t kPrompt = 16;

class Step {
 public:
  Step(const Gpt2Step& op, int threads)
      : op_(op), threads_(threads), C_(op.H * op.D), F_(op.inner), Cp_(up(C_, 2 * kPanel)),
        Qp_(up(3 * C_, 2 * kPanel)), Fp_(up(F_, 2 * kPanel)), Vp_(up(op.V, 2 * kPanel)),
        widest_(std::max(Cp_, Fp_)), pages_(page_kind(op.page_dtype)), phases_(op.L * 12 + 4, threads) {
    check();
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
  // Throws where a number that becomes an address is none of ours: nothing has been read or written through it yet.
  void check() const {
    const auto within = [](const char* name, int64_t b, int64_t value, int64_t low, int64_t high) {
      if (value >= low && value < high) return;
      throw std::invalid_argument("gpt2_step: " + std::string(name) + " of sequence " + std::to_string(b) + " is " +
                                  std::to_string(value) + ", wanted " + std::to_string(low) + " to " +
                                  std::to_string(high - 1));
    };
    const int64_t room = std::min(op_.P, op_.page * op_.max_pages);
    for (int64_t b = 0; b < op_.B; b++) {
      const int64_t count = op_.counts[b], position = op_.positions[b];
      within("counts", b, count, 0, op_.T + 1);
      if (!count) continue;
      within("positions", b, position, 0, room - count + 1);
      for (int64_t t = 0; t < count; t++) within("tokens", b, op_.tokens[b * op_.T + t], 0, op_.V);
      for (int64_t i = 0; i < (position + count + op_.page - 1) / op_.page; i++)
        within("block_table", b, op_.block_table[b * op_.max_pages + i], 0, op_.pages);
    }
    if (op_.ids) within("step", 0, *op_.step, 0, op_.steps), within("choices", 0, op_.choices, 1, op_.V + 1);
  }

  void compute() {
    floats_.resize(M_ * (2 * Cp_ + Qp_ + Fp_) + 2 * M_);
    x_ = floats_.data(), qkv_ = x_ + M_ * Cp_, o_ = qkv_ + M_ * Qp_, f_ = o_ + M_ * Cp_;
    act_bytes_.resize(M_ * kF32.row_stride(widest_));
    acts_ = {act_bytes_.data(), f_ + M_ * Fp_};
    const bool scattered = !op_.every && E_ < op_.B;  // some sequences wait
    std::vector<float> apart(scattered ? E_ * Vp_ : 0);
    float* logits = scattered ? apart.data() : op_.logits;

    if (!some_tiled_) {  // one region: its start would show in every token
      in_phases([&](Walk& walk) {
        embed(walk);
        for (int64_t layer = 0; layer < op_.L; layer++) {
          attend(walk, layer);
          after_attention(walk, layer);
        }
        head(walk, logits);
      });
    } else {  // the tiled attention has a team of its own
      in_phases([&](Walk& walk) { embed(walk); });
      for (int64_t layer = 0; layer < op_.L; layer++) {
        in_phases([&](Walk& walk) { attend(walk, layer); });
        attend_to_prompts();
        in_phases([&](Walk& walk) { after_attention(walk, layer); });
      }
      in_phases([&](Walk& walk) { head(walk, logits); });
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
    char *k_pages, *v_pages;
    Packed qkv, proj, up, down;
  };

  template <class Body>
  void in_phases(Body&& body) {
    const int64_t done = phases_done_;
    in_team(threads_, 2 * threads_, [&](Team&) {
      Walk walk(phases_, omp_get_thread_num(), done);
      body(walk);
#pragma omp single nowait
      phases_done_ = walk.phase();
    });
  }

  // A thread's scratch: a row of activations, then a query and its sum.
  float* scratch() const {
    thread_local std::vector<float> kept;
    return at_least(kept, widest_ + 2 * up(op_.D, kLanes));
  }

  // A thread's own activations, kOwn rows.
  Acts own() const {
    thread_local std::vector<float> kept;
    float* scales = at_least(kept, kOwn + kOwn * kF32.row_stride(widest_) / 4);
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
    return {floats(0), floats(1), floats(2), floats(3), reinterpret_cast<char*>(p[4]), reinterpret_cast<char*>(p[5]),
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
    const Kind& kind = kind_of(weights);
    const Cut cut{op_.cut_panels, op_.cut_bytes};
    Acts acts = M > kOwn ? acts_ : own();
    acts.ld = kind.row_stride(packed.K);
    const auto make = [&](int64_t m) { kind.write_row(acts, m, row(m, scratch()), packed.K); };
    if (M > kOwn) {
      walk.run(M, make);
      product(walk, kind, packed, acts, M, out, cut, threads_, [] {});
    } else {
      product(walk, kind, packed, acts, M, out, cut, threads_, [&] {
        for (int64_t m = 0; m < M; m++) make(m);
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
      const int64_t h = i % op_.H, offset = h * op_.stride_h * pages_.element, end = sequence.row + sequence.count;
      const PagedHead head{layer.k_pages + offset, layer.v_pages + offset,
                           op_.block_table + sequence.b * op_.max_pages, op_.page, op_.stride_p, op_.stride_s, op_.D};
      for (int64_t m = sequence.row; m < end; m++) {
        const float* k = qkv_ + m * Qp_ + C_ + h * op_.D;
        pages_.append(head, rows_[m].position, k, k + C_);
      }
      for (int64_t m = sequence.row; m < end && !sequence.tiled; m++) attend(head, m, h);
    });
  }

  // o of head h of row m, over the pages.
  void attend(const PagedHead& head, int64_t m, int64_t h) const {
    const int64_t Dp = up(op_.D, kLanes);
    const float scale = 1.0f / std::sqrt(float(op_.D));
    float *q = scratch() + widest_, *sums = q + Dp;
    std::fill(q, q + 2 * Dp, 0.0f);
    for (int64_t d = 0; d < op_.D; d++) q[d] = qkv_[m * Qp_ + h * op_.D + d] * scale;
    pages_.attend(o_ + m * Cp_ + h * op_.D, sums, q, head, rows_[m].position + 1);
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
  const PageKind pages_;
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

void gpt2_step(const Gpt2Step& op, int threads) { Step(op, threads).run(); }

}  // namespace fastlm::cpu::FASTLM_ISA
