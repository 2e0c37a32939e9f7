// Sweeps the forward of attention: odd sizes, T ≠ S, every mask, packed and offset operands, dropout.
#include "philox.h"
#include "sweep.h"

namespace {

// q, k, v cut from rows of 3 H D + `gap` elements, `offset` elements into their buffer; `far`: sequences lie kFar apart.
void sweep(Element e, int64_t B, int64_t T, int64_t S, int64_t H, int64_t D, int causal, int64_t gap, int64_t offset,
           int drop = 0, bool far = false) {
  const int64_t row = 3 * H * D + gap;
  std::mt19937 random(int(T * 1000 + S * 10 + D));
  const Tensor q(e, {B, T, H, D}, {far ? kFar : T * row, row, D, 1}, offset, &random);
  const Tensor k(e, {B, S, H, D}, {far ? kFar : S * row, row, D, 1}, offset, &random);
  const Tensor v(e, {B, S, H, D}, {far ? kFar : S * row, row, D, 1}, offset, &random);
  const Tensor o = dense(e, B, T, H, D), lse = dense(kF32, B, H, T, 1);
  const int64_t seed[] = {11, 22, 3, 4};
  const float scale = 0.3f;
  const std::unique_ptr<int64_t[]> seed_buffer(new int64_t[4]);
  std::copy(seed, seed + 4, seed_buffer.get());
  fastlm::cuda::attention_fwd(
      {o.data, o.strides[0], o.strides[1], o.strides[2], reinterpret_cast<float*>(lse.data),
       q.data, q.strides[0], q.strides[1], q.strides[2], k.data, k.strides[0], k.strides[1], k.strides[2],
       v.data, v.strides[0], v.strides[1], v.strides[2], drop ? seed_buffer.get() : nullptr, B, T, S, H, D, causal,
       scale, drop, e.dtype}, nullptr);
  for (int64_t b = 0; b < B; b++)
    for (int64_t h = 0; h < H; h++) {
      const fastlm::DropoutMask mask(seed, b, h, drop);
      for (int64_t t = 0; t < T; t++) {
        const int64_t last = causal == fastlm::kFull ? S : t + 1 + (causal == fastlm::kBottomRight ? S - T : 0);
        const int64_t end = std::clamp(last, int64_t(0), S);
        std::vector<double> x(end);
        double m = -INFINITY, l = 0;
        for (int64_t s = 0; s < end; s++) {
          for (int64_t d = 0; d < D; d++) x[s] += scale * q(b, t, h, d) * k(b, s, h, d);
          m = std::max(m, x[s]);
        }
        for (double& score : x) l += score = std::exp(score - m);
        const double got = lse(b, h, t, 0);
        expect(end ? near(got, m + std::log(l), 1e-5) : got == -INFINITY, "lse", {T, S, D, b, h, t});
        for (int64_t d = 0; d < D; d++) {
          double wanted = 0;
          for (int64_t s = 0; s < end; s++)
            if (!drop || mask.keeps(mask.bytes(t, s), int(s % 16))) wanted += x[s] / l * mask.scale() * v(b, s, h, d);
          expect(near(o(b, t, h, d), wanted, e.tolerance), "o", {T, S, D, b, h, t, d});
        }
      }
    }
}

}  // namespace

int main(int argc, char** argv) {
  const bool whole = argc > 1 && std::strcmp(argv[1], "whole") == 0;
  using namespace fastlm;
  for (const Element& e : {kBF16, kF16}) {
    sweep(e, 1, 1, 1, 1, 1, kBottomRight, 0, 1);
    sweep(e, 1, 7, 7, 2, 17, kBottomRight, 0, 0);
    sweep(e, 1, 70, 70, 1, 64, kBottomRight, 8, 8);   // rows of 16-byte multiples
    sweep(e, 1, 70, 70, 1, 24, kBottomRight, 1, 3);   // rows that are none
    sweep(e, 1, 5, 130, 1, 40, kBottomRight, 0, 0);
    sweep(e, 2, 130, 60, 1, 8, kBottomRight, 0, 0);   // queries that see no key
    sweep(e, 1, 66, 30, 1, 32, kTopLeft, 0, 0);
    sweep(e, 1, 33, 129, 2, 80, kFull, 0, 0);
    sweep(e, 1, 3, 0, 1, 16, kFull, 0, 0);
    sweep(e, 2, 67, 67, 2, 16, kBottomRight, 0, 0, 77);
    sweep(e, 2, 9, 9, 1, 16, kBottomRight, 0, 0, 0, true);
    if (whole) sweep(e, 1, 300, 300, 1, 128, kBottomRight, 0, 0, 26);
  }
  return wrong ? 1 : 0;
}
