// How a product with packed weights (packed.h) is cut among threads, and in what order a thread goes through its part.
#pragma once

#include <algorithm>

#include "../phases.h"
#include "packed.h"

namespace fastlm::cpu::FASTLM_ISA {

// Block sizes, which change no bit of a result; what serves a machine best `fastlm tune` finds.
struct Cut {
  int64_t panels;  // of a chunk, and side by side where rows are few: more streams, more bandwidth
  int64_t bytes;   // of activations that go through all panels of a chunk before the next rows do: they stay in a cache
};

// One phase of the walk: the product of M rows. A thread calls prepare() before its first chunk.
template <class Prepare>
void product(Walk& walk, const Kind& kind, const Packed& packed, const Acts& acts, int64_t M, const Output& out,
             const Cut& cut, int threads, Prepare&& prepare) {
  const int64_t panels = packed.panels();
  int64_t chunk = cut.panels;
  while (chunk > 1 && panels / chunk < 3 * threads) chunk /= 2;  // enough for everybody
  // Few rows go through many panels side by side, all of them at once; others in blocks.
  const int64_t most = M < 4 ? cut.panels : kPanelsOfMany;
  const int64_t block = M < 4 ? M : up(std::max(cut.bytes / (packed.K * kind.act_bytes), int64_t(1)), kManyRows);
  bool ready = false;
  walk.run((panels + chunk - 1) / chunk, [&](int64_t i) {
    if (!ready) prepare(), ready = true;
    const int64_t end = std::min(panels, (i + 1) * chunk);
    for (int64_t m = 0; m < M; m += block)
      kind.multiply(packed, acts, {m, std::min(M, m + block), i * chunk, end, most}, out);
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
