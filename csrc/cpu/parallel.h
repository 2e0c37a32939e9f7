// Splits work over an OpenMP team whose size the caller states: torch's own, so that one pool serves both.
#pragma once

#include <algorithm>
#include <cstdint>

#include "team.h"

namespace fastlm::cpu {

// Work below this many elementary operations is done by the calling thread: waking a team costs more.
constexpr int64_t kSmall = 32768;
constexpr int64_t kTogether = 32768;  // what a thread takes at once: to take less costs more than the work

// body(i) for i in [0, n), each i by one thread; `cost` is the operations of one i. The order in which the pieces
// are taken varies, what each computes does not.
template <class Body>
void for_each(int64_t n, int64_t cost, int threads, Body&& body) {
  if (threads <= 1 || n <= 1 || n * cost < kSmall) {
    for (int64_t i = 0; i < n; i++) body(i);
    return;
  }
  const int64_t together = std::clamp(kTogether / std::max(cost, int64_t(1)), int64_t(1), 1 + (n - 1) / (4 * threads));
  in_team(threads, n / together, [&](Team&) {
#pragma omp for schedule(dynamic, together) nowait
    for (int64_t i = 0; i < n; i++) body(i);
  });
}

}  // namespace fastlm::cpu
