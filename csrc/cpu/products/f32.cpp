// fp32 weights: y = sum x w, x fp32. Serves a model in fp32.
#include "tiles.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

struct F32 {
  using Act = float;
  using Sum = Floats;
  static constexpr int64_t kGroup = 1, kGroupBytes = 4 * kPanel;

  static void add(Sum& sum, Ints w, const Act* x) { sum += broadcast(*x) * (Floats)w; }
  static Floats finish(const Packed&, const Acts&, int64_t, int64_t, Sum sum) { return sum; }
  static void write(Act* to, float*, const float* row, int64_t K) { std::memcpy(to, row, 4 * K); }
};

}  // namespace

constinit const Kind kF32{sizeof(F32::Act), 0, write_row<F32>, multiply<F32>};

}  // namespace fastlm::cpu::FASTLM_ISA
