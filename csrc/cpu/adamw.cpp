// AdamW on the CPU, in place, in one sweep over a parameter, its gradient and its two moments (28 bytes an element):
//
//   g = scale g;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g²
//   p -= lr weight_decay p + (lr / (1 - beta1^t)) m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
#include <algorithm>
#include <cmath>

#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kPiece = 65536;  // elements a thread takes at a time

}  // namespace

void adamw_(const Adamw& op, int threads) {
  if (op.scale && !std::isfinite(*op.scale)) return;
  const float scale = op.scale ? *op.scale : 1.0f, rate = op.learning_rate / op.bias_correction1;
  const float keep = 1.0f - op.learning_rate * op.weight_decay, root = 1.0f / std::sqrt(op.bias_correction2);
  for_each((op.n + kPiece - 1) / kPiece, 12 * kPiece, threads, [&](int64_t piece) {
    const int64_t end = std::min(op.n, (piece + 1) * kPiece);
    const auto update = [&](Floats& p, Floats g, Floats& m, Floats& v) {
      g *= scale;
      m += (g - m) * op.one_minus_beta1;
      v = v * op.beta2 + g * g * op.one_minus_beta2;
      p = p * keep - m * rate / (Machine::square_root(v) * root + op.epsilon);
    };
    int64_t i = piece * kPiece;
    for (; i + kLanes <= end; i += kLanes) {
      Floats p = load(op.p + i), m = load(op.exp_avg + i), v = load(op.exp_avg_sq + i);
      update(p, load(op.g + i), m, v);
      store(op.p + i, p);
      store(op.exp_avg + i, m);
      store(op.exp_avg_sq + i, v);
    }
    if (const int64_t left = end - i; left > 0) {
      Floats p = load_tail(op.p + i, left, 0.0f), m = load_tail(op.exp_avg + i, left, 0.0f);
      Floats v = load_tail(op.exp_avg_sq + i, left, 0.0f);
      update(p, load_tail(op.g + i, left, 0.0f), m, v);
      store_tail(op.p + i, p, left);
      store_tail(op.exp_avg + i, m, left);
      store_tail(op.exp_avg_sq + i, v, left);
    }
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
