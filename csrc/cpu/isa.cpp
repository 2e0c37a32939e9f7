// Chooses the widest instruction set that was built and that this CPU has; FASTLM_CPU_ISA asks for a lower one.
// FASTLM_BUILT is "X(generic) X(avx2)", in ascending order.
#include "isas.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "declared.h"
#include "fastlm.h"

namespace fastlm::cpu {

#define FASTLM_POINTER(op, Op) void (*op)(const Op&, int);
struct Kernels {
  FASTLM_CPU_OPS(FASTLM_POINTER)
};

#define FASTLM_DECLARE(op, Op) void op(const Op&, int threads);
#define FASTLM_TAKE(op, Op) op,
#define X(isa)                                            \
  namespace isa {                                         \
  FASTLM_CPU_OPS(FASTLM_DECLARE)                          \
  constexpr Kernels kKernels{FASTLM_CPU_OPS(FASTLM_TAKE)}; \
  }
FASTLM_BUILT
#undef X

namespace {

struct Built {
  Isa isa;
  const Kernels* kernels;
};

#define X(isa) {Isa::isa, &isa::kKernels},
constexpr Built kBuilt[] = {FASTLM_BUILT};
#undef X

#define FASTLM_NAME(name, processor, flags, needs) #name,
constexpr const char* kNames[] = {FASTLM_ISAS(FASTLM_NAME)};  // by Isa

Built choose() {
  const char* asked = std::getenv("FASTLM_CPU_ISA");
  if (!asked || !*asked) {
    Built best = kBuilt[0];
    for (const Built& built : kBuilt)
      if (has_isa(built.isa)) best = built;
    return best;
  }
  const std::string told = "FASTLM_CPU_ISA is '" + std::string(asked) + "', ";
  std::string wanted;
  for (int number = 0; number < int(std::size(kNames)); number++) {
    if (std::string(asked) != kNames[number]) {
      wanted = kNames[number] + (wanted.empty() ? "" : (number == 1 ? " or " : ", ") + wanted);
      continue;
    }
    if (!has_isa(Isa(number))) throw std::runtime_error(told + "which this CPU does not have");
    for (const Built& built : kBuilt)
      if (built.isa == Isa(number)) return built;
    throw std::runtime_error(told + "which was not built; FASTLM_TARGETS=all pip install -e . builds all of them");
  }
  throw std::invalid_argument(told + "wanted " + wanted);
}

const Built& chosen() {
  static const Built built = choose();
  return built;
}

}  // namespace

const char* isa() { return kNames[int(chosen().isa)]; }

const char* widest_isa() { return kNames[int(widest())]; }

std::string isas() {
  std::string names;
  for (const Built& built : kBuilt) names += (names.empty() ? "" : ", ") + std::string(kNames[int(built.isa)]);
  return names;
}

#define FASTLM_FORWARD(op, Op) \
  void op(const Op& args, int threads) { chosen().kernels->op(args, threads); }
FASTLM_CPU_OPS(FASTLM_FORWARD)

}  // namespace fastlm::cpu
