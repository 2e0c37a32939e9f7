// bf16 weights: y = sum x w in fp32, x bf16 where the CPU multiplies pairs of it, fp32 otherwise. Serves a model in bf16.
#include "tiles.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

struct BF16 {
  using Act = Machine::Pair;
  using Sum = Floats;
  static constexpr int64_t kGroup = 2, kGroupBytes = 4 * kPanel;

  static void add(Sum& sum, Ints w, const Act* x) { Machine::add_pairs(sum, w, x); }
  static Floats finish(const Packed&, const Acts&, int64_t, int64_t, Sum sum) { return sum; }
  static void write(Act* to, float*, const float* row, int64_t K) {
    int64_t k = 0;
    for (; k + kLanes <= K; k += kLanes) store(to + k, load(row + k));
    for (; k < K; k++) to[k] = from_float<Act>(row[k]);
  }
};

}  // namespace

constinit const Kind kBf16{sizeof(BF16::Act), 0, write_row<BF16>, multiply<BF16>};

}  // namespace fastlm::cpu::FASTLM_ISA
