// Which of the instruction sets, in ascending order, this CPU has; a program of its own where the build asks for the
// widest.
#pragma once

namespace fastlm::cpu {

enum class Isa { generic, avx2, avx512, avx512bf16 };

inline bool has(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512bf16:
      return has(Isa::avx512) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return isa == Isa::generic;
}

inline Isa widest() {
  int number = int(Isa::avx512bf16);
  while (!has(Isa(number))) number--;
  return Isa(number);
}

}  // namespace fastlm::cpu

#ifdef FASTLM_PRINT_WIDEST
int main() { return int(fastlm::cpu::widest()); }
#endif
