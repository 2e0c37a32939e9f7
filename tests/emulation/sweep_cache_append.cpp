// Sweeps cache_append_: odd rows, strided caches, tokens that are written nowhere.
#include "sweep.h"

namespace {

void sweep(Element e, int64_t H, int64_t D, int64_t page, bool heads_first, int64_t offset, bool far = false) {
  const int64_t B = 3, T = 4, max_pages = 2, pages = B * max_pages;
  std::mt19937 random(int(H * 100 + D));
  const int64_t row = heads_first ? D : H * D, head = heads_first ? page * D : D;
  const Tensor k_pages(e, {pages, page, H, D}, {far ? kFar : page * H * D, row, head, 1}, offset, nullptr);
  const Tensor v_pages(e, {pages, page, H, D}, {far ? kFar : page * H * D, row, head, 1}, offset, nullptr);
  const Tensor k(e, {B, T, H, D}, {T * 3 * H * D, 3 * H * D, D, 1}, offset, &random);  // cut from a packed qkv
  const Tensor v(e, {B, T, H, D}, {T * 3 * H * D, 3 * H * D, D, 1}, offset, &random);
  std::unique_ptr<int32_t[]> table(new int32_t[pages]), positions(new int32_t[B * T]);
  for (int64_t i = 0; i < pages; i++) table[i] = int32_t(i);
  std::shuffle(table.get(), table.get() + pages, random);
  for (int64_t b = 0; b < B; b++)  // from 0 on, up to the last row, and with pads
    for (int64_t t = 0; t < T; t++)
      positions[b * T + t] = b == 2 && t > 1 ? -1 : int32_t(b == 1 ? max_pages * page - T + t : t);
  fastlm::cuda::cache_append_(
      {k_pages.data, k_pages.strides[0], k_pages.strides[1], k_pages.strides[2],
       v_pages.data, v_pages.strides[0], v_pages.strides[1], v_pages.strides[2],
       k.data, k.strides[0], k.strides[1], k.strides[2], v.data, v.strides[0], v.strides[1], v.strides[2],
       table.get(), max_pages, positions.get(), T, B, T, H, D, page, max_pages, e.dtype}, nullptr);
  int64_t written = 0, wanted = 0;
  for (int64_t b = 0; b < B; b++)
    for (int64_t t = 0; t < T; t++) {
      const int64_t p = positions[b * T + t];
      if (p < 0) continue;
      for (int64_t h = 0; h < H; h++)
        for (int64_t d = 0; d < D; d++, wanted++) {
          expect(k_pages(table[b * max_pages + p / page], p % page, h, d) == k(b, t, h, d), "k", {D, b, t, h, d});
          expect(v_pages(table[b * max_pages + p / page], p % page, h, d) == v(b, t, h, d), "v", {D, b, t, h, d});
        }
    }
  for (int64_t i = 0; i < pages; i++)
    for (int64_t j = 0; j < page; j++)
      for (int64_t h = 0; h < H; h++)
        for (int64_t d = 0; d < D; d++) written += !std::isnan(k_pages(i, j, h, d));
  if (!far) expect(written == wanted, "count of rows written", {D, written, wanted});
}

}  // namespace

int main() {
  for (const Element& e : {kF32, kBF16, kF16}) {
    sweep(e, 1, 1, 4, false, 0);
    sweep(e, 3, 17, 5, false, 1);
    sweep(e, 12, 64, 16, false, 0);   // 16 bytes at a time
    sweep(e, 2, 64, 5, true, 0);
    sweep(e, 2, 24, 5, true, 3);
    sweep(e, 2, 16, 5, false, 0, true);
  }
  return wrong ? 1 : 0;
}
