// The next token of every row of logits, on the CPU: a row a thread.
#include "draw.h"

#include "isa.h"
#include "parallel.h"

namespace fastlm::cpu::FASTLM_ISA {

void draw(const Draw& op, int threads) {
  const Sampling how{op.temperature, op.top_k, op.top_p};
  for_each(op.B, op.choices, threads, [&](int64_t b) {
    op.ids[b] = draw(op.logits + b * op.stride_lb, op.choices, how, op.uniform[b * op.stride_u]);
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
