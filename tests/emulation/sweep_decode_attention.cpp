// Sweeps decode_attention: lengths around pages and splits, shuffled pages, several new tokens, strided caches.
#include "sweep.h"

namespace {

// `heads_first`: the cache lies as (pages, H, page, D). Rows of the cache that hold no position are NaN. `far`: pages lie
// kFar apart.
void sweep(Element e, std::vector<int32_t> lengths, int64_t T, int64_t H, int64_t D, int64_t page, int64_t max_pages,
           bool heads_first, int64_t offset, bool far = false) {
  const int64_t B = int64_t(lengths.size()), pages = B * max_pages;
  std::mt19937 random(int(T * 100 + D));
  const int64_t row = heads_first ? D : H * D, head = heads_first ? page * D : D;
  const Tensor q(e, {B, T, H, D}, {T * H * D, H * D, D, 1}, offset, &random);
  const Tensor k(e, {pages, page, H, D}, {far ? kFar : page * H * D, row, head, 1}, offset, nullptr);
  const Tensor v(e, {pages, page, H, D}, {far ? kFar : page * H * D, row, head, 1}, offset, nullptr);
  const Tensor o = dense(e, B, T, H, D);
  std::unique_ptr<int32_t[]> table(new int32_t[pages]), counts(new int32_t[B]);
  for (int64_t i = 0; i < pages; i++) table[i] = int32_t(i);
  std::shuffle(table.get(), table.get() + pages, random);
  std::copy(lengths.begin(), lengths.end(), counts.get());
  std::normal_distribution<double> normal(0, 1);
  for (int64_t b = 0; b < B; b++)
    for (int64_t s = 0; s < lengths[b]; s++)
      for (int64_t h = 0; h < H; h++)
        for (int64_t d = 0; d < D; d++)
          for (const Tensor* cache : {&k, &v})
            e.write(cache->at(table[b * max_pages + s / page], s % page, h, d), normal(random));
  const int64_t splits = (max_pages * page + fastlm::kDecodeSplit - 1) / fastlm::kDecodeSplit;
  const Tensor scratch = dense(kF32, B * H, T, splits, D + 2);
  const float scale = 0.3f;
  fastlm::cuda::decode_attention(
      {o.data, reinterpret_cast<float*>(scratch.data), q.data, q.strides[0], q.strides[1], q.strides[2],
       k.data, k.strides[0], k.strides[1], k.strides[2], v.data, v.strides[0], v.strides[1], v.strides[2],
       table.get(), max_pages, counts.get(), B, T, H, D, page, max_pages, scale, e.dtype}, nullptr);
  for (int64_t b = 0; b < B; b++)
    for (int64_t h = 0; h < H; h++)
      for (int64_t t = 0; t < T; t++) {
        const int64_t end = std::max(lengths[b] - T + t + 1, int64_t(0));
        std::vector<double> x(end);
        double m = -INFINITY, l = 0;
        for (int64_t s = 0; s < end; s++) {
          for (int64_t d = 0; d < D; d++)
            x[s] += scale * q(b, t, h, d) * k(table[b * max_pages + s / page], s % page, h, d);
          m = std::max(m, x[s]);
        }
        for (double& score : x) l += score = std::exp(score - m);
        for (int64_t d = 0; d < D; d++) {
          double wanted = 0;
          for (int64_t s = 0; s < end; s++)
            wanted += x[s] / l * v(table[b * max_pages + s / page], s % page, h, d);
          expect(near(o(b, t, h, d), wanted, e.tolerance), "o", {T, D, b, h, t, d});
        }
      }
}

}  // namespace

int main(int argc, char** argv) {
  const bool whole = argc > 1 && std::strcmp(argv[1], "whole") == 0;
  for (const Element& e : {kF32, kBF16, kF16}) {
    sweep(e, {1, 16, 17}, 1, 2, 8, 16, 3, false, 0);
    sweep(e, {48, 3}, 2, 1, 17, 16, 3, false, 1);
    sweep(e, {0, 2, 40}, 5, 2, 64, 16, 3, true, 0);        // queries before the first position
    sweep(e, {127, 128, 129, 260}, 1, 1, 32, 13, 20, false, 0);
    sweep(e, {200}, 8, 1, 128, 256, 1, false, 0);          // one long page
    sweep(e, {32, 20}, 1, 1, 16, 16, 2, false, 0, true);
    if (whole) sweep(e, {1024, 1, 700}, 3, 2, 64, 64, 16, true, 0);
  }
  return wrong ? 1 : 0;
}
