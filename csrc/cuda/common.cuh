// What the CUDA kernels share: element types, 16-byte loads, the online-softmax state, launching.
#pragma once

#ifdef FASTLM_EMULATED
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FASTLM_SHARED(type, name, count) __shared__ __align__(16) type name[count]
// Shared memory whose size the launch gives, of one kind in a kernel.
#define FASTLM_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(16) unsigned char fastlm_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(fastlm_dynamic_shared)
#define FASTLM_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
// With `bytes` of dynamic shared memory, at most shared_limit() of them.
#define FASTLM_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  (fastlm::cuda::allow_shared(kernel, bytes), kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__))
#endif

#include <atomic>
#include <stdexcept>
#include <string>

#include "fastlm.h"

namespace fastlm::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

#ifndef FASTLM_EMULATED
// Bytes of dynamic shared memory that a block may have on the current device beside kStaticShared; asked once a device.
constexpr int kStaticShared = 256;
inline int shared_limit() {
  constexpr int kDevices = 64;
  static std::atomic<int> limits[kDevices];
  int device = 0, limit = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (device < kDevices) limit = limits[device];
  if (limit) return limit;
  if (cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  limit -= kStaticShared;
  if (device < kDevices) limits[device] = limit;
  return limit;
}

// Lets a kernel have more than the 48 KB that any may; always as much as there is, since another thread may be about to
// launch the same kernel with more.
template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  if (bytes + kStaticShared <= 48 * 1024) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit());
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// 2^x as the exponential unit gives it; exp2f would scale before and after, for results that are denormal.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

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

// Two neighbours, rounded by one instruction where they are narrow.
__device__ inline void store_pair(float* to, float first, float second) { to[0] = first, to[1] = second; }
__device__ inline void store_pair(__nv_bfloat16* to, float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  to[0] = pair.x, to[1] = pair.y;
}
__device__ inline void store_pair(__half* to, float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  to[0] = pair.x, to[1] = pair.y;
}

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
  __device__ static float exp(float x) { return exp2_approx(x * kLog2e); }

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
