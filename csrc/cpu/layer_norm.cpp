// Layer normalisation on the CPU, with the addition of a residual before it:
//
//   s = x + x_bias + residual,  y = (s - mean) rstd w + b,  rstd = 1 / sqrt(variance + epsilon)             (C,) a row
//   ds = ds + rstd (g - mean(g) - h mean(g h))  with g = dy w, h = (s - mean) rstd;  dw += dy h;  db += dy;  dx_bias += ds
//
// A row is widened to fp32 in a buffer that stays in the first-level cache, whatever the dtypes of x, s and y are.
#include <algorithm>
#include <memory>

#include "columns.h"
#include "isa.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T>
void widen(float* to, const T* from, int64_t C) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) store(to + c, load(from + c));
  for (; c < C; c++) to[c] = to_float(from[c]);
}

template <class T>
void narrow(T* to, const float* from, int64_t C) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) store(to + c, load(from + c));
  for (; c < C; c++) to[c] = from_float<T>(from[c]);
}

// Row n, `stride` elements apart, of a tensor of some dtype as fp32; an fp32 row is not copied.
const float* row_of(const void* from, DType dtype, int64_t n, int64_t stride, int64_t C, float* buffer) {
  if (dtype == DType::f32) return static_cast<const float*>(from) + n * stride;
  if (dtype == DType::bf16) widen(buffer, static_cast<const Bf16*>(from) + n * stride, C);
  if (dtype == DType::f16) widen(buffer, static_cast<const Fp16*>(from) + n * stride, C);
  return buffer;
}

void write_row(void* to, DType dtype, int64_t n, const float* row, int64_t C) {
  if (dtype == DType::f32) narrow(static_cast<float*>(to) + n * C, row, C);
  if (dtype == DType::bf16) narrow(static_cast<Bf16*>(to) + n * C, row, C);
  if (dtype == DType::f16) narrow(static_cast<Fp16*>(to) + n * C, row, C);
}

struct Sums {
  float one, other;
};

// The sums over a row of the two values that f(c, one, other) adds for a vector from c on, f1 for a single element.
template <class F, class F1>
Sums row_sums(int64_t C, F&& f, F1&& f1) {
  Floats one[2] = {}, other[2] = {};
  int64_t c = 0;
  for (; c + 2 * kLanes <= C; c += 2 * kLanes) {
    f(c, one[0], other[0]);
    f(c + kLanes, one[1], other[1]);
  }
  for (; c + kLanes <= C; c += kLanes) f(c, one[0], other[0]);
  Sums all{sum(one[0] + one[1]), sum(other[0] + other[1])};
  for (; c < C; c++) f1(c, all.one, all.other);
  return all;
}

constexpr int64_t kOnStack = 4096;  // floats of a row that need no heap

// Buffers of C floats each.
class Rows {
 public:
  Rows(int64_t count, int64_t C) : C_(C) {
    if (count * C > kOnStack) heap_ = std::make_unique_for_overwrite<float[]>(count * C);
  }
  float* operator[](int64_t i) { return (heap_ ? heap_.get() : stack_) + i * C_; }

 private:
  int64_t C_;
  alignas(64) float stack_[kOnStack];
  std::unique_ptr<float[]> heap_;
};

void normalise(const LayerNormFwd& op, int64_t n, Rows& rows) {
  const int64_t C = op.C;
  const float* s = row_of(op.x, op.dtype, n, op.stride_xn, C, rows[0]);
  if (op.residual) {
    const float* residual = row_of(op.residual, op.s_dtype, n, op.stride_rn, C, rows[1]);
    float* added = rows[2];
    int64_t c = 0;
    if (op.x_bias) {
      for (; c + kLanes <= C; c += kLanes) store(added + c, load(s + c) + load(op.x_bias + c) + load(residual + c));
      for (; c < C; c++) added[c] = s[c] + op.x_bias[c] + residual[c];
    } else {
      for (; c + kLanes <= C; c += kLanes) store(added + c, load(s + c) + load(residual + c));
      for (; c < C; c++) added[c] = s[c] + residual[c];
    }
    write_row(op.s, op.s_dtype, n, added, C);
    s = row_of(op.s, op.s_dtype, n, C, C, added);  // as it was rounded: backward normalises the same numbers
  }
  const float about = row_sums(C, [&](int64_t c, Floats& total, Floats&) { total += load(s + c); },
                               [&](int64_t c, float& total, float&) { total += s[c]; }).one / float(C);
  const Sums off = row_sums(  // what the mean lacks, its sum having been large, and the squares
      C,
      [&](int64_t c, Floats& lacking, Floats& squares) {
        const Floats d = load(s + c) - about;
        lacking += d;
        squares += d * d;
      },
      [&](int64_t c, float& lacking, float& squares) {
        lacking += s[c] - about;
        squares += (s[c] - about) * (s[c] - about);
      });
  const float lack = off.one / float(C), mean = about + lack;
  const float rstd = 1.0f / std::sqrt(std::max(off.other / float(C) - lack * lack, 0.0f) + op.epsilon);
  op.mean[n] = mean;
  op.rstd[n] = rstd;
  float* y = rows[1];
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes)
    store(y + c, (load(s + c) - mean) * rstd * load(op.weight + c) + load(op.bias + c));
  for (; c < C; c++) y[c] = (s[c] - mean) * rstd * op.weight[c] + op.bias[c];
  write_row(op.y, op.y_dtype, n, y, C);
}

}  // namespace

void layer_norm_fwd(const LayerNormFwd& op, int threads) {
  const int64_t C = op.C;
  for_blocks(op.N, 12 * C, threads, [&](int64_t first, int64_t last) {
    Rows rows(3, C);
    for (int64_t n = first; n < last; n++) normalise(op, n, rows);
  });
}

void layer_norm_bwd(const LayerNormBwd& op, int threads) {
  const int64_t C = op.C;
  column_sums(op.sums, op.scratch, op.N, op.count * C, 24 * C, threads,
              [&](int64_t first, int64_t last, float* sums) {
    Rows rows(4, C);
    float *dweight = sums, *dbias = sums + C, *dx_bias = op.count == 3 ? sums + 2 * C : nullptr;
    for (int64_t n = first; n < last; n++) {
      const float* s = row_of(op.s, op.s_dtype, n, op.stride_sn, C, rows[0]);
      const float* dy = row_of(op.dy, op.y_dtype, n, op.stride_dyn, C, rows[1]);
      const float* ds = op.ds ? row_of(op.ds, op.s_dtype, n, op.stride_dsn, C, rows[2]) : nullptr;
      float* dx = rows[3];
      const float mean = op.mean[n], rstd = op.rstd[n], *w = op.weight;
      const auto h = [&](int64_t c) { return (load(s + c) - mean) * rstd; };
      const auto h1 = [&](int64_t c) { return (s[c] - mean) * rstd; };
      const Sums sums_of = row_sums(
          C,
          [&](int64_t c, Floats& g, Floats& gh) {
            const Floats slope = load(dy + c) * load(w + c);
            g += slope;
            gh += slope * h(c);
          },
          [&](int64_t c, float& g, float& gh) {
            g += dy[c] * w[c];
            gh += dy[c] * w[c] * h1(c);
          });
      const float g_mean = sums_of.one / float(C), gh_mean = sums_of.other / float(C);
      int64_t c = 0;
      for (; c + kLanes <= C; c += kLanes) {
        const Floats d = load(dy + c), at = h(c);
        store(dweight + c, load(dweight + c) + d * at);
        store(dbias + c, load(dbias + c) + d);
        const Floats slope = (d * load(w + c) - g_mean - at * gh_mean) * rstd;
        store(dx + c, ds ? load(ds + c) + slope : slope);
      }
      for (; c < C; c++) {
        dweight[c] += dy[c] * h1(c);
        dbias[c] += dy[c];
        dx[c] = (dy[c] * w[c] - g_mean - h1(c) * gh_mean) * rstd + (ds ? ds[c] : 0.0f);
      }
      if (dx_bias) {
        for (c = 0; c + kLanes <= C; c += kLanes) store(dx_bias + c, load(dx_bias + c) + load(dx + c));
        for (; c < C; c++) dx_bias[c] += dx[c];
      }
      write_row(op.dx, op.dtype, n, dx, C);
      if (op.dresidual) write_row(op.dresidual, op.s_dtype, n, dx, C);
    }
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
