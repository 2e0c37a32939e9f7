// Philox4x32-10 (Salmon et al., SC 2011), the random bytes behind attention dropout; fastlm.h says what is its key.
#pragma once

#include <cstdint>

namespace fastlm::cpu {

struct PhiloxWords { uint32_t w[4]; };

inline PhiloxWords philox(PhiloxWords c, uint32_t key0, uint32_t key1) {
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

  DropoutMask(const int64_t* seed, int64_t b, int64_t h, int drop) : drop(drop) {
    if (!drop) return;
    key0 = uint32_t(seed[0]);
    key1 = uint32_t(seed[1]);
    sequence = uint32_t(seed[3] + b);
    layer_head = uint32_t(seed[2]) << 16 | uint32_t(h);
  }

  float scale() const { return 256.0f / (256.0f - float(drop)); }

  // weights[i] = 0 or itself · scale, for 16 keys from key `s`, a multiple of 16, of query t.
  void apply(float* weights, int64_t t, int64_t s) const {
    const PhiloxWords r = philox({{uint32_t(s / 16), uint32_t(t), sequence, layer_head}}, key0, key1);
    for (int i = 0; i < 16; i++) {
      const uint32_t byte = r.w[i / 4] >> (8 * (i % 4)) & 0xff;
      weights[i] = byte >= drop ? weights[i] * scale() : 0.0f;
    }
  }
};

}  // namespace fastlm::cpu
