// The Euclidean norm of many values on the CPU. Pieces of a fixed size are summed in fp32 in 16 running sums each, the
// pieces in fp64 and in order: the same bits for any number of threads.
#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

void grad_norm(const GradNorm& op, int threads) {
  const int64_t pieces = (op.n + kNormPiece - 1) / kNormPiece;
  for_each(pieces, 2 * kNormPiece, threads, [&](int64_t piece) {
    const float* g = op.g + piece * kNormPiece;
    const int64_t count = std::min(op.n - piece * kNormPiece, kNormPiece);
    Floats squares[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes)
      for (int j = 0; j < 4; j++) {
        const Floats x = load(g + i + j * kLanes);
        squares[j] += x * x;
      }
    for (; i < count; i += kLanes) {
      const Floats x = i + kLanes <= count ? load(g + i) : load_tail(g + i, count - i, 0.0f);
      squares[0] += x * x;
    }
    op.scratch[piece] = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  });
  double total = 0;
  for (int64_t piece = 0; piece < pieces; piece++) total += op.scratch[piece];
  *op.norm = float(std::sqrt(total));
}

}  // namespace fastlm::cpu::FASTLM_ISA
