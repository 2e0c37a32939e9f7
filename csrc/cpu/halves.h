// bf16 and fp16, a number at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastlm::cpu::FASTLM_ISA {

// Storage types of the two halves; arithmetic is always in float.
struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

inline float to_float(float x) { return x; }

inline float to_float(Bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(Fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, body = x.bits & 0x7fff;
  uint32_t bits;
  if (body >= 0x7c00) {
    bits = 0x7f800000 | (body << 13);  // infinity, NaN
  } else {
    bits = (body << 13) + (112u << 23);
    if (body < 0x0400) {  // zero and subnormals: the value is body · 2^-24
      const float value = float(body) * 0x1p-24f;
      std::memcpy(&bits, &value, 4);
    }
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) { return x; }

template <>
inline Bf16 from_float<Bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
inline Fp16 from_float<Fp16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (bits < 0x38800000) {                                   // below the smallest normal
    float value;
    std::memcpy(&value, &bits, 4);
    return {uint16_t(sign | uint16_t(std::nearbyint(value * 0x1p24f)))};
  }
  bits -= 112u << 23;
  return {uint16_t(sign | ((bits + 0xfff + ((bits >> 13) & 1)) >> 13))};
}

}  // namespace fastlm::cpu::FASTLM_ISA
