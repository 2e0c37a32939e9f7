// Every csrc/cpu/<op>.cpp is compiled once for each instruction set (isas.h), with FASTLM_ISA naming the namespace it
// fills; isa.cpp chooses one when the process starts.
#pragma once

#include "declared.h"
#include "fastlm.h"

#define FASTLM_DECLARE(op, Op) void op(const Op&, int threads);
namespace fastlm::cpu::FASTLM_ISA {
FASTLM_CPU_OPS(FASTLM_DECLARE)
}
#undef FASTLM_DECLARE
