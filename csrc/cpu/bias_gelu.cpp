// A bias and GELU on the CPU: y[n, c] = gelu(x[n, c] + bias[c]), and its gradients. Memory moves once: x is read, y
// written; backward reads dy and x and writes dx, the sums for dbias are taken on the way.
#include "columns.h"
#include "gelu.h"
#include "isa.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T>
void fwd(const BiasGeluFwd& op, int threads) {
  for_blocks(op.N, 16 * op.C, threads, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      const T* x = static_cast<const T*>(op.x) + n * op.stride_xn;
      T* y = static_cast<T*>(op.y) + n * op.C;
      int64_t c = 0;
      for (; c + kLanes <= op.C; c += kLanes) store(y + c, gelu(load(x + c) + load(op.bias + c)));
      if (const int64_t left = op.C - c)
        store_tail(y + c, gelu(load_tail(x + c, left, 0.0f) + load_tail(op.bias + c, left, 0.0f)), left);
    }
  });
}

template <class T>
void bwd(const BiasGeluBwd& op, int threads) {
  column_sums(op.dbias, op.scratch, op.N, op.C, 24 * op.C, threads, [&](int64_t first, int64_t last, float* sums) {
    for (int64_t n = first; n < last; n++) {
      const T* x = static_cast<const T*>(op.x) + n * op.stride_xn;
      const T* dy = static_cast<const T*>(op.dy) + n * op.stride_dyn;
      T* dx = static_cast<T*>(op.dx) + n * op.C;
      int64_t c = 0;
      for (; c + kLanes <= op.C; c += kLanes) {
        const Floats d = load(dy + c) * gelu_slope(load(x + c) + load(op.bias + c));
        store(dx + c, d);
        store(sums + c, load(sums + c) + d);
      }
      if (const int64_t left = op.C - c) {
        const Floats at = load_tail(x + c, left, 0.0f) + load_tail(op.bias + c, left, 0.0f);
        const Floats d = load_tail(dy + c, left, 0.0f) * gelu_slope(at);
        store_tail(dx + c, d, left);
        for (int64_t i = 0; i < left; i++) sums[c + i] += d[i];
      }
    }
  });
}

}  // namespace

void bias_gelu_fwd(const BiasGeluFwd& op, int threads) {
  switch (op.dtype) {
    case DType::f32: return fwd<float>(op, threads);
    case DType::bf16: return fwd<Bf16>(op, threads);
    case DType::f16: return fwd<Fp16>(op, threads);
  }
}

void bias_gelu_bwd(const BiasGeluBwd& op, int threads) {
  switch (op.dtype) {
    case DType::f32: return bwd<float>(op, threads);
    case DType::bf16: return bwd<Bf16>(op, threads);
    case DType::f16: return bwd<Fp16>(op, threads);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
