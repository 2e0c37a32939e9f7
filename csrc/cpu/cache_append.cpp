// Writes new keys and values into the pages of a cache, on the CPU.
//
//   k_pages[block_table[b, p / page], p % page] = k[b, t],  p = positions[b, t];  likewise v;  p = -1 writes nothing
//
// A copy of rows of D elements: a thread owns a token.
#include <cstring>

#include "isa.h"
#include "parallel.h"

namespace fastlm::cpu::FASTLM_ISA {

void cache_append_(const CacheAppend& op, int threads) {
  const int64_t element = op.dtype == DType::f32 ? 4 : 2, row = op.D * element;
  for_each(op.B * op.T, 2 * op.H * op.D, threads, [&](int64_t bt) {
    const int64_t b = bt / op.T, t = bt % op.T, position = op.positions[b * op.stride_pb + t];
    if (position < 0) return;
    const int64_t page = op.block_table[b * op.stride_tb + position / op.page], slot = position % op.page;
    for (int64_t h = 0; h < op.H; h++) {
      const char* k = static_cast<const char*>(op.k) +
                      (b * op.stride_kb + t * op.stride_kt + h * op.stride_kh) * element;
      const char* v = static_cast<const char*>(op.v) +
                      (b * op.stride_vb + t * op.stride_vt + h * op.stride_vh) * element;
      char* to_k = static_cast<char*>(op.k_pages) +
                   (page * op.stride_kpp + slot * op.stride_kps + h * op.stride_kph) * element;
      char* to_v = static_cast<char*>(op.v_pages) +
                   (page * op.stride_vpp + slot * op.stride_vps + h * op.stride_vph) * element;
      std::memcpy(to_k, k, row);
      std::memcpy(to_v, v, row);
    }
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
