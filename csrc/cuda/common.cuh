// What the CUDA kernels share: element types, 16-byte loads, the online-softmax state, launching.
#pragma once

#ifdef FASTLM_EMULATED
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FASTLM_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define FASTLM_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

#include <stdexcept>
#include <string>

#include "fastlm.h"

namespace fastlm::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16(x); }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half(x); }

// 16 bytes of T, moved by one instruction.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// Elements before p reaches a 16-byte boundary.
template <class T>
__device__ inline int64_t elements_to_boundary(const T* p) {
  return (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T);
}

// The softmax of the values seen so far: maximum m and sum s of exp(x - m). Exponentials are taken in base 2, after
// the subtraction: folding log2 e into x would round where logits are large.
struct OnlineSoftmax {
  float m, s;

  // The exponents' origin: m, or 0 while nothing but -inf was seen (-inf minus itself would be NaN).
  __device__ static float origin(float m) { return m == -INFINITY ? 0.0f : m; }
  __device__ static float exp(float x) { return exp2f(x * kLog2e); }

  __device__ void merge(OnlineSoftmax other) {
    const float top = fmaxf(m, other.m), from = origin(top);
    s = s * exp(m - from) + other.s * exp(other.m - from);
    m = top;
  }

  // log sum exp(x - m), natural; -inf where only -inf was seen.
  __device__ float log_sum() const { return log2f(s) * kLn2; }
};

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace fastlm::cuda
