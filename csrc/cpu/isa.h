// The instruction sets the kernels are compiled for. Every csrc/cpu/<op>.cpp is compiled once for each, with FASTLM_ISA
// naming the namespace it fills; isa.cpp chooses one when the process starts.
#pragma once

#include "fastlm.h"

#define FASTLM_CPU_OPS(X)               \
  X(softmax_xent_fwd, SoftmaxXentFwd)   \
  X(softmax_xent_bwd, SoftmaxXentBwd)   \
  X(softmax_xent_, SoftmaxXentBoth)     \
  X(gpt2_blocks_fwd, Gpt2BlocksFwd)     \
  X(gpt2_blocks_bwd, Gpt2BlocksBwd)     \
  X(bias_gelu_fwd, BiasGeluFwd)         \
  X(bias_gelu_bwd, BiasGeluBwd)         \
  X(layer_norm_fwd, LayerNormFwd)       \
  X(layer_norm_bwd, LayerNormBwd)       \
  X(adamw_, Adamw)                      \
  X(grad_norm, GradNorm)                \
  X(attention_fwd, AttentionFwd)        \
  X(attention_bwd, AttentionBwd)        \
  X(decode_attention, DecodeAttention)  \
  X(cache_append_, CacheAppend)         \
  X(gpt2_step, Gpt2Step)                \
  X(draw, Draw)

#define FASTLM_DECLARE(op, Op) void op(const Op&, int threads);

namespace fastlm::cpu {
namespace generic {
FASTLM_CPU_OPS(FASTLM_DECLARE)
}
namespace avx2 {
FASTLM_CPU_OPS(FASTLM_DECLARE)
}
namespace avx512 {
FASTLM_CPU_OPS(FASTLM_DECLARE)
}
namespace avx512bf16 {
FASTLM_CPU_OPS(FASTLM_DECLARE)
}
}  // namespace fastlm::cpu

#undef FASTLM_DECLARE
