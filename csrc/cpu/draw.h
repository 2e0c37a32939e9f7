// The next token from a row of logits; `choose` in fastlm/generation/sampling.py is its reference.
//
//   p = exp((x - top) / temperature)     of the top_k largest, then of the smallest set whose p reaches top_p
//   token = first id whose cumulative p exceeds u · sum p
//
// Nothing is sorted but a few: the largest of every kPart numbers say from where on the top_k-th can lie, sums over
// p of like exponent where the set that reaches top_p ends.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

struct Sampling {
  double temperature;  // 0: the largest
  int64_t top_k;       // 0: all
  double top_p;        // 1: all
};

// What is left of a row: n numbers x and their p, of the ids, or of all ids in order where there are none.
struct Choices {
  std::vector<float> x, p;  // as long as whole vectors; x ends with -infinity
  std::vector<int64_t> ids;
  int64_t n = 0;
};

constexpr int64_t kPart = 32;            // numbers of a lane, of which the largest is kept
constexpr int64_t kParted = kPart * kLanes;

// The largest of every lane of every kParted numbers; false where one is NaN.
inline bool largest_of_parts(std::vector<float>& tops, const float* x, int64_t V) {
  tops.resize((V + kParted - 1) / kParted * kLanes);
  Ints bad{};
  for (int64_t part = 0; part * kParted < V; part++) {
    Floats top = broadcast(-kInfinity);
    const int64_t end = std::min(V, (part + 1) * kParted);
    for (int64_t i = part * kParted; i < end; i += kLanes) {
      const Floats values = i + kLanes <= V ? load(x + i) : load_tail(x + i, V - i, -kInfinity);
      bad |= values != values;
      top = maximum(top, values);
    }
    store(tops.data() + part * kLanes, top);
  }
  return !any(bad);
}

// take(i) for every x[i] ≥ bound, in order.
template <class Take>
inline void those_from(float bound, const float* x, int64_t V, Take&& take) {
  for (int64_t i = 0; i < V; i += kLanes) {
    if (i + kLanes <= V && !any(load(x + i) >= bound)) continue;
    for (int64_t j = i; j < std::min(V, i + kLanes); j++)
      if (x[j] >= bound) take(j);
  }
}

// The k-th largest number of the row, k ≤ V.
inline float kth_largest(const std::vector<float>& tops, const float* x, int64_t V, int64_t k) {
  thread_local std::vector<float> some;
  if (k <= int64_t(tops.size())) {
    some = tops;
    std::nth_element(some.begin(), some.begin() + (k - 1), some.end(), std::greater<float>());
    const float bound = some[k - 1];  // k numbers are as large, or larger
    some.clear();
    those_from(bound, x, V, [&](int64_t i) { some.push_back(x[i]); });
  } else {
    some.assign(x, x + V);
  }
  std::nth_element(some.begin(), some.begin() + (k - 1), some.end(), std::greater<float>());
  return some[k - 1];
}

// p = 0 outside of the smallest set that reaches top_p; of equals at its border the lowest ids are inside.
inline void keep_top_p(Choices& kept, double total, double top_p) {
  const auto bin_of = [](float p) {
    uint32_t bits;
    std::memcpy(&bits, &p, 4);
    return int64_t(bits >> 18);
  };
  const double wanted = top_p * total;
  const float least = float((1.0 - top_p) * total / double(kept.n)) * 0.999f;  // those below miss less than 1 - top_p
  std::vector<double> sums(bin_of(1.0f) + 1);
  for (int64_t i = 0; i < kept.n; i++)
    if (kept.p[i] >= least) sums[bin_of(kept.p[i])] += kept.p[i];
  double before = 0.0;  // what lies in higher bins
  int64_t bin = int64_t(sums.size()) - 1;
  while (bin > 0 && before + sums[bin] < wanted) before += sums[bin--];
  std::vector<int64_t> border;  // of them some are inside
  for (int64_t i = 0; i < kept.n; i++) {
    const int64_t at = bin_of(kept.p[i]);
    if (at == bin) border.push_back(i);
    else if (at < bin) kept.p[i] = 0.0f;
  }
  std::stable_sort(border.begin(), border.end(), [&](int64_t a, int64_t b) { return kept.p[a] > kept.p[b]; });
  for (int64_t i : border) {
    const float p = kept.p[i];
    if (before >= wanted) kept.p[i] = 0.0f;
    before += p;
  }
}

inline int64_t draw(const float* x, int64_t V, const Sampling& how, double u) {
  thread_local std::vector<float> tops;
  thread_local Choices kept;
  if (!largest_of_parts(tops, x, V)) return kBad;
  const int64_t first_top = std::max_element(tops.begin(), tops.end()) - tops.begin();
  const float top = tops[first_top];
  if (std::fabs(top) == kInfinity) return kBad;
  if (how.temperature == 0.0) {
    int64_t i = first_top / kLanes * kParted;
    while (x[i] != top) i++;
    return i;
  }

  kept.x.clear(), kept.ids.clear();
  if (how.top_k && how.top_k < V) {
    const float bound = kth_largest(tops, x, V, how.top_k);
    those_from(bound, x, V, [&](int64_t i) { kept.x.push_back(x[i]), kept.ids.push_back(i); });
  } else {
    kept.x.assign(x, x + V);
  }
  kept.n = int64_t(kept.x.size());
  kept.x.resize((kept.n + kParted - 1) / kParted * kParted, -kInfinity);
  kept.p.resize(kept.x.size());
  // No temperature becomes 0 or infinite.
  const float inverse = float(std::clamp(1.0 / how.temperature, 1e-37, 1e37));
  double total = 0.0;
  for (size_t i = 0; i < kept.x.size(); i += kLanes) {
    const Floats p = exp((load(kept.x.data() + i) - top) * inverse);
    store(kept.p.data() + i, p);
    total += sum(p);
  }
  if (how.top_p < 1.0) {
    keep_top_p(kept, total, how.top_p);
    total = 0.0;
    for (int64_t i = 0; i < kept.n; i += kLanes) total += sum(load(kept.p.data() + i));
  }

  const double wanted = u * total;
  double before = 0.0;
  int64_t at = 0;  // the vector whose numbers exceed it, or, where rounding lets none, the last that holds any
  bool exceeds = false;
  for (int64_t i = 0; i < kept.n && !exceeds; i += kLanes) {
    const double whole = sum(load(kept.p.data() + i));
    if (whole > 0.0) at = i;
    exceeds = before + whole > wanted;
    if (!exceeds) before += whole;
  }
  int64_t token = at;  // the last that has a probability, if no other
  for (int64_t i = at; i < at + kLanes; i++) {
    if (kept.p[i] > 0.0f) token = i;
    if (exceeds && (before += kept.p[i]) > wanted) break;
  }
  return kept.ids.empty() ? token : kept.ids[token];
}

}  // namespace fastlm::cpu::FASTLM_ISA
