// The tanh form of GELU, gelu(x) = x σ(z), z = 2 √(2/π) (x + 0.044715 x³), and its slope.
#pragma once

#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

// σ(z), and 0 where that is below what fp32 holds.
inline Floats gelu_sigmoid(Floats x) {
  const Floats z = x * (x * x * 0.044715f + 1.0f) * -1.5957691216f;  // -z
  return select(z > 88.0f, Floats{}, 1.0f / (exp(select(z > 88.0f, Floats{}, z)) + 1.0f));
}

inline Floats gelu(Floats x) { return x * gelu_sigmoid(x); }

// Slope and value: σ + x σ (1 - σ) dz/dx, and x σ; where |x| is so large that x dz/dx overflows, σ (1 - σ) is 0.
struct GeluSlope {
  Floats slope, value;
};
inline GeluSlope gelu_with_slope(Floats x) {
  const Floats sigmoid = gelu_sigmoid(x);
  const Floats bounded = select(x > 1e6f, broadcast(1e6f), select(x < -1e6f, broadcast(-1e6f), x));
  const Floats steep = bounded * (bounded * bounded * 0.134145f + 1.0f) * 1.5957691216f;  // x dz/dx
  return {sigmoid + sigmoid * (1.0f - sigmoid) * steep, x * sigmoid};
}

inline Floats gelu_slope(Floats x) { return gelu_with_slope(x).slope; }

}  // namespace fastlm::cpu::FASTLM_ISA
