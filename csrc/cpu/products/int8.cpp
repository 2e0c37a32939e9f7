// int8 weights: y = s_x[m] s_w[n] sum x w, x int8, a scale a row of x and an output. Serves a model quantised to int8, and
// the head of one quantised to int4. Where the CPU multiplies unsigned bytes by signed ones, x comes as x + 128, and
// 128 sum w is taken off at the end. All sums are exact.
#include <type_traits>

#include "bytes.h"
#include "tiles.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

struct Int8 {
  using Act = Machine::Byte;
  using Sum = Ints;
  static constexpr int64_t kGroup = 4, kGroupBytes = 4 * kPanel;
  static constexpr bool kShifted = std::is_unsigned_v<Act>;

  static void add(Sum& sum, Ints w, const Act* x) { Machine::add_bytes(sum, w, x); }

  static Floats finish(const Packed& packed, const Acts& acts, int64_t m, int64_t n, Sum exact) {
    if constexpr (kShifted) {
      Ints sum_w;
      std::memcpy(&sum_w, packed.sums + n, sizeof sum_w);
      exact -= sum_w << 7;
    }
    return __builtin_convertvector(exact, Floats) * (load(packed.scale + n) * acts.scale[m]);
  }

  static void write(Act* to, float* scale, const float* row, int64_t K) {
    round_row(to, scale, row, K, kShifted ? 128 : 0);
  }
};

}  // namespace

constinit const Kind kInt8{sizeof(Int8::Act), 0, write_row<Int8>, multiply<Int8>};

}  // namespace fastlm::cpu::FASTLM_ISA
