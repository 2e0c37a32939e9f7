// What the sweeps share: elements of every dtype in buffers of exact size, which AddressSanitizer watches, and a count
// of what is wrong. A sweep runs its kernel over odd sizes, strides and offsets, compares with plain double arithmetic,
// prints what is wrong and exits with 1, at once where EMU_FIRST is set. Built under AddressSanitizer and
// UndefinedBehaviorSanitizer.
#pragma once

#include <sys/mman.h>

#define EMU_IMPLEMENTATION
#include "cuda_on_cpu.h"

#include "fastlm.h"

using fastlm::DType;

inline int wrong = 0;

inline void expect(bool right, const char* what, const std::vector<int64_t>& where) {
  if (right || wrong++ >= 5) return;
  std::printf("wrong %s:", what);
  for (const int64_t index : where) std::printf(" %ld", long(index));
  std::printf("\n");
  if (std::getenv("EMU_FIRST")) std::exit(1);
}

inline bool near(double got, double wanted, double tolerance) {
  return std::abs(got - wanted) <= tolerance * (1 + std::abs(wanted));
}

struct Element {
  DType dtype;
  double tolerance;
  int size() const { return dtype == DType::f32 ? 4 : 2; }
  double read(const char* p) const {
    if (dtype == DType::f32) { float x; std::memcpy(&x, p, 4); return x; }
    if (dtype == DType::bf16) { __nv_bfloat16 x; std::memcpy(&x, p, 2); return __bfloat162float(x); }
    __half x; std::memcpy(&x, p, 2); return __half2float(x);
  }
  void write(char* p, double value) const {
    if (dtype == DType::f32) { const float x = float(value); std::memcpy(p, &x, 4); }
    if (dtype == DType::bf16) { const auto x = __float2bfloat16(float(value)); std::memcpy(p, &x, 2); }
    if (dtype == DType::f16) { const auto x = __float2half(float(value)); std::memcpy(p, &x, 2); }
  }
};

constexpr Element kF32 = {DType::f32, 1e-5}, kBF16 = {DType::bf16, 2e-2}, kF16 = {DType::f16, 3e-3};

// A tensor of up to four dimensions in a buffer of its own that begins `offset` elements before it and ends with its
// last element; what no element covers is NaN (where strides reach beyond 2^31 elements: 0). Filled with normal numbers, or left as it is.
constexpr int64_t kFar = (int64_t(1) << 31) + 64;

struct Tensor {
  Element e;
  int64_t sizes[4], strides[4];
  std::unique_ptr<char[]> buffer;
  char* data;

  Tensor(Element e, std::initializer_list<int64_t> size, std::initializer_list<int64_t> stride, int64_t offset,
         std::mt19937* random)
      : e(e) {
    std::copy(size.begin(), size.end(), sizes);
    std::copy(stride.begin(), stride.end(), strides);
    int64_t last = 0;
    bool empty = false;
    for (int i = 0; i < 4; i++) {
      last += (sizes[i] - 1) * strides[i];
      empty = empty || !sizes[i];
    }
    const int64_t elements = empty ? 0 : offset + last + 1;
    if (elements > int64_t(1) << 31) {  // pages that nobody touches cost no memory
      data = static_cast<char*>(mmap(nullptr, elements * e.size(), PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (data == MAP_FAILED) std::abort();
    } else {
      buffer.reset(new char[elements * e.size()]);
      std::memset(buffer.get(), 0xff, elements * e.size());
      data = buffer.get() + (empty ? 0 : offset * e.size());
    }
    std::normal_distribution<double> normal(0, 1);
    if (!random) return;
    for (int64_t i = 0; i < sizes[0]; i++)
      for (int64_t j = 0; j < sizes[1]; j++)
        for (int64_t k = 0; k < sizes[2]; k++)
          for (int64_t l = 0; l < sizes[3]; l++) e.write(at(i, j, k, l), normal(*random));
  }
  char* at(int64_t i, int64_t j, int64_t k, int64_t l) const {
    return data + (i * strides[0] + j * strides[1] + k * strides[2] + l * strides[3]) * e.size();
  }
  double operator()(int64_t i, int64_t j, int64_t k, int64_t l) const { return e.read(at(i, j, k, l)); }
};

// (sizes[0], sizes[1], sizes[2], sizes[3]) contiguous.
inline Tensor dense(Element e, int64_t a, int64_t b, int64_t c, int64_t d, std::mt19937* random = nullptr) {
  return Tensor(e, {a, b, c, d}, {b * c * d, c * d, d, 1}, 0, random);
}
