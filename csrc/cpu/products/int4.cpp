// int4 weights: y = s_x[m] sum_g s_w[g, n] sum_{k in g} x w, x int8, a scale a row of x, an output and a group g of 64 k.
// Serves a model quantised to int4. w is kept as 0 … 15, and 8 sum x is taken off for each group. A group has its scales
// (kPanel fp32) before its eight steps; word j of a step holds k = 8 step + (0 … 3) in the low halves of its bytes,
// 8 step + (4 … 7) in the high ones. All sums within a group are exact.
#include "bytes.h"
#include "tiles.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

struct Int4 {
  using Act = int8_t;  // a row ends with the sums of its groups, int32
  using Sum = Floats;
  static constexpr int64_t kGroup = kWeightGroup, kGroupBytes = 9 * 4 * kPanel;

  // As product_of_panels (tiles.h), a group after the other.
  template <int rows, int panels, bool fetch>
  static void product(Sum (&sums)[rows][panels * kParts], const char* w, int64_t bytes, const Act* x, int64_t ldx) {
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
      for (int p = 0; p < panels * kParts; p++) sums[m][p] = Sum{};
    const int32_t* x_sums = reinterpret_cast<const int32_t*>(x + bytes / kGroupBytes * kGroup);
    const int64_t ahead = rows >= 4 ? panels * bytes : kAhead;
    for (int64_t g = 0, at = 0; at < bytes; g++) {
      Floats scales[panels * kParts];
      Ints exact[rows][panels * kParts];
      const auto fetch_step = [&](int p) {
        if constexpr (fetch) __builtin_prefetch(w + p * bytes + at + ahead, 0, 2);
      };
#pragma GCC unroll 16
      for (int p = 0; p < panels; p++) {
        fetch_step(p);
#pragma GCC unroll 16
        for (int i = 0; i < kParts; i++)
          scales[p * kParts + i] = load(reinterpret_cast<const float*>(w + p * bytes + at) + kLanes * i);
      }
#pragma GCC unroll 16
      for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
        for (int p = 0; p < panels * kParts; p++) exact[m][p] = Ints{};
      at += 4 * kPanel;
      for (int first = 0; first < 8; first += Machine::kNibbleSteps) {
        Machine::Nibbles parts[rows][panels * kParts];
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
          for (int p = 0; p < panels * kParts; p++) parts[m][p] = Machine::Nibbles{};
#pragma GCC unroll 1  // or else all products are kept, to be added up in another order
        for (int step = first; step < first + Machine::kNibbleSteps; step++, at += 4 * kPanel) {
          const Act* x_at = x + g * kGroup + step * 8;
#pragma GCC unroll 16
          for (int p = 0; p < panels; p++) {
            fetch_step(p);
            Ints words[kParts];
#pragma GCC unroll 16
            for (int i = 0; i < kParts; i++) std::memcpy(&words[i], w + p * bytes + at + 4 * kLanes * i, sizeof(Ints));
#pragma GCC unroll 16
            for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
              for (int i = 0; i < kParts; i++) Machine::add_nibbles(parts[m][p * kParts + i], words[i], x_at + m * ldx);
          }
        }
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 16
          for (int p = 0; p < panels * kParts; p++) exact[m][p] += Machine::whole(parts[m][p]);
      }
#pragma GCC unroll 16
      for (int m = 0; m < rows; m++) {
        int32_t x_sum;
        std::memcpy(&x_sum, reinterpret_cast<const char*>(x_sums + g) + m * ldx, 4);
#pragma GCC unroll 16
        for (int p = 0; p < panels * kParts; p++)
          sums[m][p] += __builtin_convertvector(exact[m][p] - 8 * x_sum, Floats) * scales[p];
      }
    }
  }

  static Floats finish(const Packed&, const Acts& acts, int64_t m, int64_t, Sum sum) { return sum * acts.scale[m]; }

  static void write(Act* to, float* scale, const float* row, int64_t K) { round_row(to, scale, row, K, 0); }

  static void write_sums(Act* row, int64_t end) {
    for (int64_t g = 0; g < end / kGroup; g++) {
      int32_t total = 0;
      for (int64_t k = 0; k < kGroup; k++) total += row[g * kGroup + k];
      std::memcpy(row + end + 4 * g, &total, 4);
    }
  }
};

}  // namespace

constinit const Kind kInt4{sizeof(Int4::Act), 4, write_row<Int4>, multiply<Int4>};

}  // namespace fastlm::cpu::FASTLM_ISA
