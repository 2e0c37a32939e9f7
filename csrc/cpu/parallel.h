// Splits work over an OpenMP team whose size the caller states: torch's own, so that one pool serves both.
#pragma once

#include <omp.h>

#include <cstdint>

namespace fastlm::cpu {

// Work below this many elementary operations is done by the calling thread: waking a team costs more.
constexpr int64_t kSmall = 32768;

// body(i) for i in [0, n), each i by one thread; `cost` is the operations of one i. The order in which the pieces
// are taken varies, what each computes does not.
template <class Body>
void for_each(int64_t n, int64_t cost, int threads, Body&& body) {
  if (threads <= 1 || n <= 1 || n * cost < kSmall) {
    for (int64_t i = 0; i < n; i++) body(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < n; i++) body(i);
}

}  // namespace fastlm::cpu
