// Causal softmax attention on the CPU, forward and backward, without a (T, S) matrix in memory.
//
//   s[t, j] = scale q[t]·k[j],  p = softmax_j(s),  o[t] = sum_j drop(p)[t, j] v[j]
//   delta[t] = do[t]·o[t],  ds = p (drop(do·v) - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = drop(p)^T do
//
// Tiles of kTile queries by kTile keys. A head's operands are first copied to fp32, contiguous, K and V also transposed
// (a head cut from a packed qkv has rows 9 KB apart, which collide in the caches). Forward: an item is a run of query
// tiles of one head; each keeps a running maximum and sum over the key tiles. Backward recomputes p from lse: where there
// are heads for every thread one sweep over the tiles of a head makes dq, dk and dv; otherwise key tiles and
// query tiles are items of their own and p is computed twice. Sums run over tiles in ascending order in both, so
// the bits do not depend on the number of threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "philox.h"
#include "products/cached.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kTile = 64;
constexpr int64_t kRowsAhead = 12;  // rows are fetched ahead where they are copied: they lie too far apart to be guessed

inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Scratch of one thread, kept between calls: fresh pages would cost more than the arithmetic on them.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    thread_local std::vector<float> kept;
    if (int64_t(kept.size()) < floats + 16) kept.resize(floats + 16);
    next_ = kept.data() + (-(reinterpret_cast<uintptr_t>(kept.data()) / 4) & 15);
  }
  float* take(int64_t floats) {
    float* p = next_;
    next_ += up(floats, 16);
    return p;
  }

 private:
  float* next_;
};

// Where the keys end that query t sees, 0 … S.
inline int64_t key_end(int64_t t, int64_t T, int64_t S, int causal) {
  if (causal == kFull) return S;
  return std::clamp(t + 1 + (causal == kBottomRight ? S - T : 0), int64_t(0), S);
}

// Query r of the tile at t0 sees the first r + 1 + shift keys of the tile at j0.
inline int64_t shift_of(int64_t t0, int64_t j0, int64_t T, int64_t S, int causal) {
  return causal == kFull ? kTile : t0 - j0 + (causal == kBottomRight ? S - T : 0);
}

// The parts of a tile's products (products/cached.h) that what is seen needs. Queries by keys: scores.
struct Scores {
  int64_t shift, K;
  int64_t first_row(int64_t n) const { return std::max(n - shift, int64_t(0)) / kRows * kRows; }
  int64_t begin(int64_t) const { return 0; }
  int64_t end(int64_t) const { return K; }
};

// Sums over keys for queries, with weights that are 0 behind what they see, up to `written`.
struct OverKeys {
  int64_t shift, K;
  int64_t first_row(int64_t) const { return 0; }
  int64_t begin(int64_t) const { return 0; }
  int64_t end(int64_t m) const { return std::clamp(m + kRows + shift, int64_t(0), K); }
};

// Sums over queries for keys.
struct OverQueries {
  int64_t shift, K;
  int64_t first_row(int64_t) const { return 0; }
  int64_t begin(int64_t m) const { return std::clamp(m - shift, int64_t(0), K); }
  int64_t end(int64_t) const { return K; }
};

// How much of a row of weights is written, of which `seen` are not 0: what a product reads for kRows rows at once.
inline int64_t written(int64_t seen) { return std::min(up(seen + kRows, kLanes), kTile); }

// to (up(rows, kTile), Dp) = from (rows, D), padded with zeros.
template <class T>
void copy_rows(float* to, const T* from, int64_t stride, int64_t rows, int64_t D, int64_t Dp) {
  for (int64_t r = 0; r < rows; r++) {
    const T* row = from + r * stride;
    int64_t d = 0;
    for (int64_t c = 0; c < D * int64_t(sizeof(T)); c += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(row + kRowsAhead * stride) + c);
    for (; d + kLanes <= D; d += kLanes) store(to + r * Dp + d, load(row + d));
    if (d < D) store(to + r * Dp + d, load_tail(row + d, D - d, 0.0f));
  }
  std::fill(to + rows * Dp, to + up(rows, kTile) * Dp, 0.0f);
}

// to[tile] (Dp, kTile) = rows tile·kTile … of from (up(rows, kTile), Dp), transposed.
void transpose_tiles(float* to, const float* from, int64_t rows, int64_t Dp) {
  for (int64_t r0 = 0; r0 < rows; r0 += kTile)
    for (int64_t d = 0; d < Dp; d += kLanes)
      for (int64_t r = 0; r < kTile; r += kLanes)
        transpose(to + r0 * Dp + d * kTile + r, kTile, from + (r0 + r) * Dp + d, Dp);
}

// rows (rows, D) of a head, strided in memory, from fp32 rows Dp apart.
template <class T>
void write_rows(T* to, int64_t stride, const float* from, int64_t rows, int64_t D, int64_t Dp) {
  for (int64_t r = 0; r < rows; r++) {
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) store(to + r * stride + d, load(from + r * Dp + d));
    if (d < D) store_tail(to + r * stride + d, load(from + r * Dp + d), D - d);
  }
}

// ---- forward

// One tile of queries against all its keys: o (kTile, Dp), m, l (kTile,) running over key tiles.
struct ForwardTile {
  float *scores, *o;         // (kTile, kTile), (kTile, Dp)
  float m[kTile], l[kTile];
};

// p = exp(scale s - m) in place, with the running maximum and sum; returns with o rescaled to the new maximum.
void softmax_tile(ForwardTile& tile, int64_t rows, const int64_t* ends, int64_t j0, int64_t Dp, float scale) {
  for (int64_t r = 0; r < rows; r++) {
    float* s = tile.scores + r * kTile;  // (kTile,)
    const int64_t seen = std::clamp(ends[r] - j0, int64_t(0), kTile), end = written(seen);
    float factor = scale;
    if (!(scale > 0)) {  // -infinity times it would not hide
      for (int64_t j = 0; j < seen; j++) s[j] *= scale;
      factor = 1.0f;
    }
    for (int64_t j = seen; j < end; j++) s[j] = -kInfinity;
    Floats top = broadcast(-kInfinity);
    for (int64_t j = 0; j < end; j += kLanes) {
      const Floats scaled = load(s + j) * factor;
      top = maximum(scaled, top);
      store(s + j, scaled);
    }
    const float m = std::max(tile.m[r], maximum(top));
    if (m == -kInfinity) {  // nothing is seen, or all that is seen is NaN, which must not vanish
      for (int64_t j = 0; j < seen; j++)
        if (s[j] != s[j]) tile.m[r] = tile.l[r] = kNaN;
      std::fill(s, s + end, 0.0f);
      continue;
    }
    if (m != tile.m[r]) {
      const float shrink = exp(broadcast(tile.m[r] - m))[0];
      tile.l[r] *= shrink;
      for (int64_t d = 0; d < Dp; d += kLanes) store(tile.o + r * Dp + d, load(tile.o + r * Dp + d) * shrink);
      tile.m[r] = m;
    }
    Floats total{};
    for (int64_t j = 0; j < end; j += kLanes) {
      const Floats p = exp(load(s + j) - m);
      total += p;
      store(s + j, p);
    }
    tile.l[r] += sum(total);
  }
}

void drop_tile(float* weights, const DropoutMask& mask, int64_t rows, int64_t t0, int64_t j0) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < kTile; j += 16) {
      const PhiloxWords bytes = mask.bytes(t0 + r, j0 + j);
      float* kept = weights + r * kTile + j;
      for (int i = 0; i < 16; i++) kept[i] = mask.keeps(bytes, i) ? kept[i] * mask.scale() : 0.0f;
    }
}

// How many runs the tiles of one head are cut into, so that every thread finds work.
inline int64_t pieces(int64_t heads, int64_t tiles, int threads) {
  return heads == 0 || heads >= 2 * threads ? 1 : std::min(tiles, (4 * threads + heads - 1) / heads);
}

template <class T>
void fwd(const AttentionFwd& op, int threads) {
  const int64_t Dp = up(op.D, kLanes), tiles = (op.T + kTile - 1) / kTile;
  const int64_t runs = pieces(op.B * op.H, tiles, threads);
  const int64_t cost = 4 * op.T * op.S * op.D / std::max(runs, int64_t(1)) / 2;
  for_each(op.B * op.H * runs, cost, threads, [&](int64_t item) {
    const int64_t run = runs - 1 - item / (op.B * op.H);  // the longest first
    const int64_t bh = item % (op.B * op.H), b = bh / op.H, h = bh % op.H;
    const int64_t first = tiles * run / runs, last = tiles * (run + 1) / runs;
    const int64_t S = key_end(std::min(last * kTile, op.T) - 1, op.T, op.S, op.causal), Sp = up(S, kTile);
    Scratch scratch(2 * Sp * Dp + std::max(Sp, kTile) * Dp + 2 * kTile * Dp + kTile * kTile + 256);
    float *k = scratch.take(Sp * Dp), *kt = scratch.take(Sp * Dp), *v = scratch.take(Sp * Dp);
    float* q = scratch.take(kTile * Dp);
    ForwardTile tile{scratch.take(kTile * kTile), scratch.take(kTile * Dp), {}, {}};
    copy_rows(k, static_cast<const T*>(op.k) + b * op.stride_kb + h * op.stride_kh, op.stride_ks, S, op.D, Dp);
    copy_rows(v, static_cast<const T*>(op.v) + b * op.stride_vb + h * op.stride_vh, op.stride_vs, S, op.D, Dp);
    transpose_tiles(kt, k, S, Dp);
    const DropoutMask mask(op.seed, b, h, op.drop);
    const T* q_head = static_cast<const T*>(op.q) + b * op.stride_qb + h * op.stride_qh;
    T* o_head = static_cast<T*>(op.o) + b * op.stride_ob + h * op.stride_oh;
    float* lse = op.lse + bh * op.T;

    for (int64_t i = first; i < last; i++) {
      const int64_t t0 = i * kTile, rows = std::min(kTile, op.T - t0);
      const int64_t M = up(rows, kRows);
      int64_t ends[kTile];
      for (int64_t r = 0; r < rows; r++) ends[r] = key_end(t0 + r, op.T, op.S, op.causal);
      copy_rows(q, q_head + t0 * op.stride_qt, op.stride_qt, rows, op.D, Dp);
      std::fill(tile.o, tile.o + kTile * Dp, 0.0f);
      std::fill(tile.m, tile.m + kTile, -kInfinity);
      std::fill(tile.l, tile.l + kTile, 0.0f);
      for (int64_t j0 = 0; j0 < ends[rows - 1]; j0 += kTile) {
        const int64_t shift = shift_of(t0, j0, op.T, op.S, op.causal);
        product<false>(tile.scores, kTile, q, Dp, 1, kt + j0 * Dp, kTile, M, kTile, Scores{shift, Dp});
        softmax_tile(tile, rows, ends, j0, Dp, op.scale);
        if (op.drop) drop_tile(tile.scores, mask, rows, t0, j0);
        const int64_t keys = std::min(kTile, ends[rows - 1] - j0);
        product<true>(tile.o, Dp, tile.scores, kTile, 1, v + j0 * Dp, Dp, M, Dp, OverKeys{shift, keys});
      }
      for (int64_t r = 0; r < rows; r++) {
        const float scale = tile.l[r] > 0 ? 1.0f / tile.l[r] : tile.l[r];  // 0 where nothing is seen, NaN kept
        for (int64_t d = 0; d < Dp; d += kLanes) store(tile.o + r * Dp + d, load(tile.o + r * Dp + d) * scale);
        lse[t0 + r] = tile.m[r] == -kInfinity ? -kInfinity : tile.m[r] + std::log(tile.l[r]);
      }
      write_rows(o_head + t0 * op.stride_ot, op.stride_ot, tile.o, rows, op.D, Dp);
    }
  });
}

// ---- backward

// The fp32 operands of one head, rows padded to whole tiles.
struct Head {
  int64_t T, S, Dp;
  float *q, *do_, *k, *kt, *vt;  // (Tp, Dp) ×2, (Sp, Dp), tiles of (Dp, kTile) ×2
  const float *lse, *delta;      // (T,) ×2
  float *p, *ds;                 // (kTile, kTile) ×2

  static int64_t floats(const AttentionBwd& op, int64_t Dp) {
    return 2 * up(op.T, kTile) * Dp + 4 * up(op.S, kTile) * Dp + 2 * kTile * kTile + 256;
  }
};

template <class T>
Head load_head(const AttentionBwd& op, Scratch& scratch, int64_t b, int64_t h, int64_t Dp) {
  const int64_t Tp = up(op.T, kTile), Sp = up(op.S, kTile);
  Head head{op.T, op.S, Dp, scratch.take(Tp * Dp), scratch.take(Tp * Dp), scratch.take(Sp * Dp),
            scratch.take(Sp * Dp), scratch.take(Sp * Dp), op.lse + (b * op.H + h) * op.T,
            op.delta + (b * op.H + h) * op.T, scratch.take(kTile * kTile), scratch.take(kTile * kTile)};
  float* v = scratch.take(Sp * Dp);
  copy_rows(head.q, static_cast<const T*>(op.q) + b * op.stride_qb + h * op.stride_qh, op.stride_qt, op.T, op.D, Dp);
  copy_rows(head.do_, static_cast<const T*>(op.do_) + b * op.stride_dob + h * op.stride_doh, op.stride_dot, op.T,
            op.D, Dp);
  copy_rows(head.k, static_cast<const T*>(op.k) + b * op.stride_kb + h * op.stride_kh, op.stride_ks, op.S, op.D, Dp);
  copy_rows(v, static_cast<const T*>(op.v) + b * op.stride_vb + h * op.stride_vh, op.stride_vs, op.S, op.D, Dp);
  transpose_tiles(head.kt, head.k, op.S, Dp);
  transpose_tiles(head.vt, v, op.S, Dp);
  return head;
}

// Fills head.p with drop(p) and head.ds with scale · ds for queries t0 … and keys j0 …; 0 behind what is seen, up to
// `written`.
void backward_tile(const Head& head, const AttentionBwd& op, const DropoutMask& mask, int64_t t0, int64_t j0) {
  const int64_t rows = std::min(kTile, head.T - t0), M = up(rows, kRows);
  const Scores part{shift_of(t0, j0, head.T, head.S, op.causal), head.Dp};
  product<false>(head.p, kTile, head.q + t0 * head.Dp, head.Dp, 1, head.kt + j0 * head.Dp, kTile, M, kTile, part);
  product<false>(head.ds, kTile, head.do_ + t0 * head.Dp, head.Dp, 1, head.vt + j0 * head.Dp, kTile, M, kTile, part);
  if (op.drop) drop_tile(head.ds, mask, rows, t0, j0);
  for (int64_t r = 0; r < rows; r++) {
    float *p = head.p + r * kTile, *ds = head.ds + r * kTile;
    const int64_t seen = std::clamp(key_end(t0 + r, op.T, op.S, op.causal) - j0, int64_t(0), kTile);
    const int64_t last = written(seen);
    const float lse = head.lse[t0 + r], delta = head.delta[t0 + r];
    for (int64_t j = 0; j < last; j += kLanes) {
      const Floats weight = seen ? exp(load(p + j) * op.scale - lse) : Floats{};
      const Floats slope = weight * (load(ds + j) - delta) * op.scale;
      store(p + j, weight);
      store(ds + j, slope);
    }
    for (int64_t j = seen; j < last; j++) p[j] = ds[j] = 0.0f;
  }
  if (op.drop) drop_tile(head.p, mask, rows, t0, j0);
}

template <class T>
void write_delta(const AttentionBwd& op, int threads) {
  for_each(op.B * op.T, op.H * op.D, threads, [&](int64_t bt) {
    const int64_t b = bt / op.T, t = bt % op.T;
    for (int64_t h = 0; h < op.H; h++) {
      const T* o = static_cast<const T*>(op.o) + b * op.stride_ob + t * op.stride_ot + h * op.stride_oh;
      const T* g = static_cast<const T*>(op.do_) + b * op.stride_dob + t * op.stride_dot + h * op.stride_doh;
      Floats total{};
      int64_t d = 0;
      for (; d + kLanes <= op.D; d += kLanes) total += load(o + d) * load(g + d);
      if (d < op.D) total += load_tail(o + d, op.D - d, 0.0f) * load_tail(g + d, op.D - d, 0.0f);
      op.delta[(b * op.H + h) * op.T + t] = sum(total);
    }
  });
}

template <class T>
struct Gradients {
  T *dq, *dk, *dv;
  Gradients(const AttentionBwd& op, int64_t b, int64_t h)
      : dq(static_cast<T*>(op.dq) + b * op.stride_dqb + h * op.stride_dqh),
        dk(static_cast<T*>(op.dk) + b * op.stride_dkb + h * op.stride_dkh),
        dv(static_cast<T*>(op.dv) + b * op.stride_dvb + h * op.stride_dvh) {}
};

// The first query tile that sees a key of the tile at j0.
inline int64_t first_query(const AttentionBwd& op, int64_t j0) {
  if (op.causal == kFull) return 0;
  const int64_t t = j0 - (op.causal == kBottomRight ? op.S - op.T : 0);
  return std::max(t, int64_t(0)) / kTile * kTile;
}

// dk and dv of the keys at j0; where `dq` is given, also adds this tile's part to it (Tp, Dp).
template <class T>
void key_tile(const AttentionBwd& op, const Head& head, const DropoutMask& mask, const Gradients<T>& to, float* dk,
              float* dv, float* dq, int64_t j0) {
  const int64_t Dp = head.Dp, keys = std::min(kTile, op.S - j0);
  std::fill(dk, dk + kTile * Dp, 0.0f);
  std::fill(dv, dv + kTile * Dp, 0.0f);
  for (int64_t t0 = first_query(op, j0); t0 < op.T; t0 += kTile) {
    const int64_t rows = std::min(kTile, op.T - t0);
    backward_tile(head, op, mask, t0, j0);
    const int64_t shift = shift_of(t0, j0, op.T, op.S, op.causal);
    const OverQueries part{shift, rows};
    product<true>(dv, Dp, head.p, 1, kTile, head.do_ + t0 * Dp, Dp, kTile, Dp, part);
    product<true>(dk, Dp, head.ds, 1, kTile, head.q + t0 * Dp, Dp, kTile, Dp, part);
    if (dq)
      product<true>(dq + t0 * Dp, Dp, head.ds, kTile, 1, head.k + j0 * Dp, Dp, up(rows, kRows), Dp,
                    OverKeys{shift, keys});
  }
  write_rows(to.dk + j0 * op.stride_dks, op.stride_dks, dk, keys, op.D, Dp);
  write_rows(to.dv + j0 * op.stride_dvs, op.stride_dvs, dv, keys, op.D, Dp);
}

// dq of the queries at t0.
template <class T>
void query_tile(const AttentionBwd& op, const Head& head, const DropoutMask& mask, const Gradients<T>& to, float* dq,
                int64_t t0) {
  const int64_t Dp = head.Dp, rows = std::min(kTile, op.T - t0);
  std::fill(dq, dq + kTile * Dp, 0.0f);
  const int64_t end = key_end(t0 + rows - 1, op.T, op.S, op.causal);
  for (int64_t j0 = 0; j0 < end; j0 += kTile) {
    const int64_t keys = std::min(kTile, op.S - j0);
    backward_tile(head, op, mask, t0, j0);
    product<true>(dq, Dp, head.ds, kTile, 1, head.k + j0 * Dp, Dp, up(rows, kRows), Dp,
                  OverKeys{shift_of(t0, j0, op.T, op.S, op.causal), keys});
  }
  write_rows(to.dq + t0 * op.stride_dqt, op.stride_dqt, dq, rows, op.D, Dp);
}

template <class T>
void bwd(const AttentionBwd& op, int threads) {
  const int64_t Dp = up(op.D, kLanes), heads = op.B * op.H, Tp = up(op.T, kTile);
  const int64_t cost = 5 * op.T * op.S * op.D;
  write_delta<T>(op, threads);
  if (heads >= threads) {
    for_each(heads, cost, threads, [&](int64_t bh) {
      const int64_t b = bh / op.H, h = bh % op.H;
      Scratch scratch(Head::floats(op, Dp) + Tp * Dp + 2 * kTile * Dp);
      const Head head = load_head<T>(op, scratch, b, h, Dp);
      const DropoutMask mask(op.seed, b, h, op.drop);
      const Gradients<T> to(op, b, h);
      float *dq = scratch.take(Tp * Dp), *dk = scratch.take(kTile * Dp), *dv = scratch.take(kTile * Dp);
      std::fill(dq, dq + Tp * Dp, 0.0f);
      for (int64_t j0 = 0; j0 < op.S; j0 += kTile) key_tile(op, head, mask, to, dk, dv, dq, j0);
      write_rows(to.dq, op.stride_dqt, dq, op.T, op.D, Dp);
    });
    return;
  }
  const int64_t key_tiles = (op.S + kTile - 1) / kTile, query_tiles = (op.T + kTile - 1) / kTile;
  const int64_t runs = std::min(std::max(key_tiles, query_tiles), int64_t(4) * threads);
  for_each(heads * runs, cost / std::max(runs, int64_t(1)), threads, [&](int64_t item) {
    const int64_t bh = item % heads, run = item / heads, b = bh / op.H, h = bh % op.H;
    Scratch scratch(Head::floats(op, Dp) + 2 * kTile * Dp);
    const Head head = load_head<T>(op, scratch, b, h, Dp);
    const DropoutMask mask(op.seed, b, h, op.drop);
    const Gradients<T> to(op, b, h);
    float *one = scratch.take(kTile * Dp), *two = scratch.take(kTile * Dp);
    for (int64_t j = run; j < key_tiles; j += runs)  // dealt round, since early keys are seen by more queries
      key_tile(op, head, mask, to, one, two, nullptr, j * kTile);
    for (int64_t i = query_tiles - 1 - run; i >= 0; i -= runs) query_tile(op, head, mask, to, one, i * kTile);
  });
}

}  // namespace

void attention_fwd(const AttentionFwd& op, int threads) {
  switch (op.dtype) {
    case DType::f32: return fwd<float>(op, threads);
    case DType::bf16: return fwd<Bf16>(op, threads);
    case DType::f16: return fwd<Fp16>(op, threads);
  }
}

void attention_bwd(const AttentionBwd& op, int threads) {
  switch (op.dtype) {
    case DType::f32: return bwd<float>(op, threads);
    case DType::bf16: return bwd<Bf16>(op, threads);
    case DType::f16: return bwd<Fp16>(op, threads);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
