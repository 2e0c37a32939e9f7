// Philox4x32-10 (Salmon et al., SC 2011), the random bytes behind attention dropout; fastlm.h says what is its key.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTLM_EVERYWHERE __host__ __device__ inline
#else
#define FASTLM_EVERYWHERE inline
#endif

namespace fastlm {

struct PhiloxWords { uint32_t w[4]; };

FASTLM_EVERYWHERE PhiloxWords philox(PhiloxWords c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c.w[0], p1 = uint64_t(0xCD9E8D57u) * c.w[2];
    c = {{uint32_t(p1 >> 32) ^ c.w[1] ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w[3] ^ key1, uint32_t(p0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// The mask of one head: which of a query's keys are kept.
struct DropoutMask {
  uint32_t key0 = 0, key1 = 0, sequence = 0, layer_head = 0;
  uint32_t drop;  // of 256

  FASTLM_EVERYWHERE DropoutMask(const int64_t* seed, int64_t b, int64_t h, int drop) : drop(drop) {
    if (!drop) return;
    key0 = uint32_t(seed[0]);
    key1 = uint32_t(seed[1]);
    sequence = uint32_t(seed[3] + b);
    layer_head = uint32_t(seed[2]) << 16 | uint32_t(h);
  }

  FASTLM_EVERYWHERE float scale() const { return 256.0f / (256.0f - float(drop)); }

  // The bytes of the 16 keys from key `s`, a multiple of 16, of query t.
  FASTLM_EVERYWHERE PhiloxWords bytes(int64_t t, int64_t s) const {
    return philox({{uint32_t(s / 16), uint32_t(t), sequence, layer_head}}, key0, key1);
  }

  // Whether key `i` of the 16 is kept.
  FASTLM_EVERYWHERE bool keeps(const PhiloxWords& bytes, int i) const {
    // Chosen, not indexed: an array with a running index would lie in memory.
    const uint32_t first = i & 4 ? bytes.w[1] : bytes.w[0], last = i & 4 ? bytes.w[3] : bytes.w[2];
    return ((i & 8 ? last : first) >> (8 * (i % 4)) & 0xff) >= drop;
  }
};

}  // namespace fastlm
