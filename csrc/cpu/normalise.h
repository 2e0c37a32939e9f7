// A row's layer norm where the statistics are not kept.
#pragma once

#include <cmath>

#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

// (row - mean) / sqrt(variance + epsilon) · w + b, (C,)
inline void normalise(float* to, const float* row, const float* w, const float* b, int64_t C, float epsilon) {
  Floats total{}, squares{};
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) total += load(row + c);
  float mean = sum(total);
  for (; c < C; c++) mean += row[c];
  mean /= float(C);
  for (c = 0; c + kLanes <= C; c += kLanes) {
    const Floats d = load(row + c) - mean;
    squares += d * d;
  }
  float variance = sum(squares);
  for (; c < C; c++) variance += (row[c] - mean) * (row[c] - mean);
  const float rstd = 1.0f / std::sqrt(variance / float(C) + epsilon);
  for (c = 0; c + kLanes <= C; c += kLanes) store(to + c, (load(row + c) - mean) * rstd * load(w + c) + load(b + c));
  for (; c < C; c++) to[c] = (row[c] - mean) * rstd * w[c] + b[c];
}

}  // namespace fastlm::cpu::FASTLM_ISA
