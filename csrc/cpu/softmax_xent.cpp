// Softmax cross-entropy on the CPU.
//
//   lse[n]   = log sum_v exp(x[n, v])
//   loss[n]  = lse[n] - x[n, y[n]]                              0 where y[n] == ignore
//   dx[n, v] = (exp(x[n, v] - lse[n]) - [v == y[n]]) dloss[n]
//
// A thread owns a row. Forward sweeps it twice, for the maximum and for the sum; a row (201 KB at V = 50257, fp32)
// stays in the core's second-level cache between the sweeps, so main memory is read once. Backward reads x once and
// writes dx once, past the caches where rows are long: dx is not needed again before they have been refilled.
// In place both are done while the row lies in the cache: one read and one write in all.
#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// A sum of four running vectors: one would wait for its own addition.
constexpr int kUnroll = 4;
constexpr int64_t kBlock = kUnroll * kLanes;

template <class T>
float row_maximum(const T* x, int64_t V) {
  Floats m[kUnroll];
  for (auto& lane : m) lane = broadcast(-kInfinity);
  Ints nan{};
  int64_t v = 0;
  for (; v + kBlock <= V; v += kBlock)
    for (int i = 0; i < kUnroll; i++) {
      const Floats values = load(x + v + i * kLanes);
      m[i] = maximum(values, m[i]);
      nan |= values != values;
    }
  for (; v < V; v += kLanes) {
    const Floats values = v + kLanes <= V ? load(x + v) : load_tail(x + v, V - v, -kInfinity);
    m[0] = maximum(values, m[0]);
    nan |= values != values;
  }
  for (int i = 0; i < kLanes; i++)
    if (nan[i]) return kNaN;
  return maximum(maximum(maximum(m[0], m[1]), maximum(m[2], m[3])));
}

template <class T>
float row_sum_exp(const T* x, int64_t V, float m) {
  Floats s[kUnroll] = {};
  int64_t v = 0;
  for (; v + kBlock <= V; v += kBlock)
    for (int i = 0; i < kUnroll; i++) s[i] += exp(load(x + v + i * kLanes) - m);
  for (; v < V; v += kLanes) {
    const Floats values = v + kLanes <= V ? load(x + v) : load_tail(x + v, V - v, -kInfinity);
    s[0] += exp(values - m);
  }
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

template <class T>
void row_loss(float* loss, float* lse, const T* x, int64_t V, int64_t y, int64_t ignore) {
  const float m = row_maximum(x, V);
  const bool finite = m - m == 0;
  const float log_sum = finite ? std::log(row_sum_exp(x, V, m)) : 0.0f;
  *lse = m + log_sum;
  // Not lse - x[y]: where logits are large, lse has been rounded to their size.
  *loss = y == ignore ? 0.0f : y < 0 || y >= V || !finite ? kNaN : log_sum - (to_float(x[y]) - m);
}

template <class T>
void fwd(const SoftmaxXentFwd& op, int threads) {
  for_each(op.N, 8 * op.V, threads, [&](int64_t n) {
    const T* x = static_cast<const T*>(op.x) + n * op.stride_xn;  // (V,)
    row_loss(op.loss + n, op.lse + n, x, op.V, op.y[n], op.ignore);
  });
}

inline bool on_vector_boundary(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Floats) == 0; }

template <class T>
void row_gradient(T* dx, const T* x, int64_t V, float lse, float dloss) {
  int64_t v = 0;
  if constexpr (std::is_same_v<T, float>) {
    if (V >= Machine::kStreamFrom && dx != x) {
      for (; v < V && !on_vector_boundary(dx + v); v++)
        dx[v] = exp(broadcast(x[v] - lse))[0] * dloss;
      for (; v + kLanes <= V; v += kLanes) Machine::stream(dx + v, exp(load(x + v) - lse) * dloss);
      Machine::stream_end();
    }
  }
  for (; v + kLanes <= V; v += kLanes) store(dx + v, exp(load(x + v) - lse) * dloss);
  if (v < V) store_tail(dx + v, exp(load_tail(x + v, V - v, -kInfinity) - lse) * dloss, V - v);
}

// The gradient of a row, with what stands in place of it where the label is ignored or wrong.
template <class T>
void row_bwd(T* dx, const T* x, int64_t V, int64_t y, int64_t ignore, float lse, float dloss) {
  if (y == ignore || y < 0 || y >= V) {
    const T fill = from_float<T>(y == ignore ? 0.0f : kNaN);
    for (int64_t v = 0; v < V; v++) dx[v] = fill;
    return;
  }
  const float at_label = (exp(broadcast(to_float(x[y]) - lse))[0] - 1.0f) * dloss;  // before dx overwrites x
  row_gradient(dx, x, V, lse, dloss);
  dx[y] = from_float<T>(at_label);
}

template <class T>
void bwd(const SoftmaxXentBwd& op, int threads) {
  for_each(op.N, 8 * op.V, threads, [&](int64_t n) {
    const T* x = static_cast<const T*>(op.x) + n * op.stride_xn;  // (V,)
    T* dx = static_cast<T*>(op.dx) + n * op.stride_dxn;           // (V,)
    row_bwd(dx, x, op.V, op.y[n], op.ignore, op.lse[n], op.dloss[n]);
  });
}

template <class T>
void both(const SoftmaxXentBoth& op, int threads) {
  for_each(op.N, 16 * op.V, threads, [&](int64_t n) {
    T* x = static_cast<T*>(op.x) + n * op.stride_xn;  // (V,)
    row_loss(op.loss + n, op.lse + n, x, op.V, op.y[n], op.ignore);
    row_bwd(x, x, op.V, op.y[n], op.ignore, op.lse[n], op.dloss[n]);
  });
}

}  // namespace

void softmax_xent_fwd(const SoftmaxXentFwd& op, int threads) {
  switch (op.dtype) {
    case DType::f32: return fwd<float>(op, threads);
    case DType::bf16: return fwd<Bf16>(op, threads);
    case DType::f16: return fwd<Fp16>(op, threads);
  }
}

void softmax_xent_bwd(const SoftmaxXentBwd& op, int threads) {
  switch (op.dtype) {
    case DType::f32: return bwd<float>(op, threads);
    case DType::bf16: return bwd<Bf16>(op, threads);
    case DType::f16: return bwd<Fp16>(op, threads);
  }
}

void softmax_xent_(const SoftmaxXentBoth& op, int threads) {
  switch (op.dtype) {
    case DType::f32: return both<float>(op, threads);
    case DType::bf16: return both<Bf16>(op, threads);
    case DType::f16: return both<Fp16>(op, threads);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
