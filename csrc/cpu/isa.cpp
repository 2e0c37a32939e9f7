// Chooses the widest instruction set that was built and that this CPU has; FASTLM_CPU_ISA asks for a lower one.
#include "isa.h"
#include "isa_has.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastlm::cpu {
namespace {

bool built(Isa isa) {
  switch (isa) {
#ifdef FASTLM_HAVE_AVX2
    case Isa::avx2: return true;
#endif
#ifdef FASTLM_HAVE_AVX512
    case Isa::avx512: return true;
#endif
#ifdef FASTLM_HAVE_AVX512BF16
    case Isa::avx512bf16: return true;
#endif
    default: return isa == Isa::generic;
  }
}

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16"};  // by Isa

Isa choose() {
  const char* asked = std::getenv("FASTLM_CPU_ISA");
  int number = 3;
  if (!asked || !*asked) {
    while (!built(Isa(number)) || !has(Isa(number))) number--;
    return Isa(number);
  }
  const std::string name = asked;
  while (number >= 0 && name != kNames[number]) number--;
  if (number < 0) {
    throw std::invalid_argument("FASTLM_CPU_ISA is '" + name + "', wanted avx512bf16, avx512, avx2 or generic");
  }
  const Isa isa = Isa(number);
  if (!has(isa)) throw std::runtime_error("FASTLM_CPU_ISA is '" + name + "', which this CPU does not have");
  if (!built(isa)) {
    throw std::runtime_error("FASTLM_CPU_ISA is '" + name + "', which was not built; FASTLM_TARGETS=all pip install -e . "
                             "builds all of them");
  }
  return isa;
}

Isa chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const char* isa() { return kNames[int(chosen())]; }

const char* widest_isa() { return kNames[int(widest())]; }

std::string isas() {
  std::string names;
  for (int number = 0; number < 4; number++)
    if (built(Isa(number))) names += (names.empty() ? "" : ", ") + std::string(kNames[number]);
  return names;
}

#ifdef FASTLM_HAVE_AVX512BF16
#define FASTLM_AVX512BF16(op) if (chosen() == Isa::avx512bf16) return avx512bf16::op(args, threads);
#else
#define FASTLM_AVX512BF16(op)
#endif
#ifdef FASTLM_HAVE_AVX512
#define FASTLM_AVX512(op) if (chosen() == Isa::avx512) return avx512::op(args, threads);
#else
#define FASTLM_AVX512(op)
#endif
#ifdef FASTLM_HAVE_AVX2
#define FASTLM_AVX2(op) if (chosen() == Isa::avx2) return avx2::op(args, threads);
#else
#define FASTLM_AVX2(op)
#endif
#define FASTLM_FORWARD(op, Op)              \
  void op(const Op& args, int threads) {    \
    FASTLM_AVX512BF16(op)                   \
    FASTLM_AVX512(op)                       \
    FASTLM_AVX2(op)                         \
    return generic::op(args, threads);      \
  }

FASTLM_CPU_OPS(FASTLM_FORWARD)

}  // namespace fastlm::cpu
