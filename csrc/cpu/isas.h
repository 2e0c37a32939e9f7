// The ladder of instruction sets: a row for each that the kernels are compiled for, and which of them this CPU has.
// csrc/declared.py reads the rows too, for the build and the tests. A new one is a row here and simd/<name>.h, where it
// says what it does better than simd/generic.h; vectors of another width want tiles of their own in products/*.h; another
// processor wants its kIs_… below.
#pragma once

// X(name, processor, the compiler's flags, what the CPU must have), both beside those of its rows above it.
#define FASTLM_ISAS(X) \
  X(generic, any, "", true) \
  X(avx2, x86_64, "-mavx2 -mfma -mf16c", has("avx2") && has("fma") && has("f16c")) \
  X(avx512, x86_64, "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512", \
    has("avx512f") && has("avx512bw") && has("avx512dq") && has("avx512vl")) \
  X(avx512bf16, x86_64, "-mavx512bf16 -mavx512vnni", has("avx512bf16") && has("avx512vnni"))

namespace fastlm::cpu {

#define FASTLM_NAME(name, processor, flags, needs) name,
enum class Isa { FASTLM_ISAS(FASTLM_NAME) };
#undef FASTLM_NAME

#if defined(__x86_64__)
#define has __builtin_cpu_supports
constexpr bool kIs_x86_64 = true;
#else
#define has(feature) false
constexpr bool kIs_x86_64 = false;
#endif
#if defined(__aarch64__)
constexpr bool kIs_aarch64 = true;
#else
constexpr bool kIs_aarch64 = false;
#endif
constexpr bool kIs_any = true;

// Whether this CPU has an instruction set, and so those of its processor below it.
inline bool has_isa(Isa isa) {
  bool all = true, own = false;
#define FASTLM_ASK(name, processor, flags, needs) \
  if (Isa::name <= isa && kIs_##processor) {      \
    all = all && (needs);                         \
    own = Isa::name == isa;                       \
  }
  FASTLM_ISAS(FASTLM_ASK)
#undef FASTLM_ASK
  return all && own;
}
#undef has

inline Isa widest() {
  Isa found = Isa::generic;
#define FASTLM_ASK(name, processor, flags, needs) \
  if (has_isa(Isa::name)) found = Isa::name;
  FASTLM_ISAS(FASTLM_ASK)
#undef FASTLM_ASK
  return found;
}

}  // namespace fastlm::cpu

#ifdef FASTLM_PRINT_WIDEST
// The build asks: how many rows of this processor lie below the widest that it has.
int main() {
  int count = -1;
#define FASTLM_COUNT(name, processor, flags, needs) \
  count += fastlm::cpu::kIs_##processor && fastlm::cpu::Isa::name <= fastlm::cpu::widest();
  FASTLM_ISAS(FASTLM_COUNT)
  return count;
}
#endif
