// The warp functions of csrc/cuda/warp.cuh on the CPU: every lane shows what it holds and computes its own part.
#pragma once

#include "cuda_on_cpu.h"

namespace fastlm::cuda {

struct Fragments { uint32_t a[4], b[2]; };

template <class T>
float element(uint32_t pair, int i) {
  const uint16_t bits = uint16_t(pair >> (16 * i));
  T value;
  std::memcpy(&value, &bits, 2);
  return to_float(value);
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, T) {
  const auto& slot = emu::show(~0u, Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = emu::running->current->lane, g = lane / 4, q = lane % 4;
  for (int k = 0; k < 16; k++) {
    const int holder = k % 8 / 2, half = k / 8;
    const auto row = emu::shown<Fragments>(slot[4 * g + holder]);
    for (int i = 0; i < 2; i++) {
      const auto column = emu::shown<Fragments>(slot[4 * (2 * q + i) + holder]);
      const float factor = element<T>(column.b[half], k % 2);
      d[i] += element<T>(row.a[2 * half], k % 2) * factor;
      d[2 + i] += element<T>(row.a[2 * half + 1], k % 2) * factor;
    }
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto& slot = emu::show(~0u, row);
  const int lane = emu::running->current->lane, g = lane / 4, q = lane % 4;
  for (int matrix = 0; matrix < 4; matrix++)
    r[matrix] = static_cast<const uint32_t*>(emu::shown<const void*>(slot[8 * matrix + g]))[q];
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto& slot = emu::show(~0u, row);
  const int lane = emu::running->current->lane, g = lane / 4, q = lane % 4;
  for (int matrix = 0; matrix < 4; matrix++) {
    const auto upper = static_cast<const uint16_t*>(emu::shown<const void*>(slot[8 * matrix + 2 * q]))[g];
    const auto lower = static_cast<const uint16_t*>(emu::shown<const void*>(slot[8 * matrix + 2 * q + 1]))[g];
    r[matrix] = upper | uint32_t(lower) << 16;
  }
}

// As late as it may be: what nobody waited for has not arrived.
inline void copy_async(void* shared, const void* global) { emu::running->current->copies.push_back({shared, global}); }
inline void wait_for_copies() {
  for (const emu::Copy& copy : emu::running->current->copies) std::memcpy(copy.to, copy.from, 16);
  emu::running->current->copies.clear();
}

}  // namespace fastlm::cuda
