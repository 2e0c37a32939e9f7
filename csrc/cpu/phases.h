// Phases of work in one OpenMP region, each cut into chunks that the threads take from a counter.
//
// A phase has ended when its chunks are done, not when all threads have come: a thread whose core was taken away holds
// up the others for no more than the chunk in its hands. Who waits spins a little, then yields its core.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace fastlm::cpu {

constexpr int kSpins = 4000;  // pauses, about 0.1 ms, before a waiting thread yields

struct alignas(64) PhaseCounter {
  std::atomic<int64_t> next{0}, done{0};
};

// The counters of as many phases as one call has.
using Phases = std::vector<PhaseCounter>;

// One thread's walk through the phases: every thread calls `run` for the same ones in the same order.
class Walk {
 public:
  explicit Walk(Phases& phases) : counter_(phases.data()) {}

  template <class Body>
  void run(int64_t chunks, Body&& body) {
    PhaseCounter& counter = *counter_++;
    for (int64_t i; (i = counter.next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      body(i);
      counter.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; counter.done.load(std::memory_order_acquire) < chunks;) {
      if (++spins > kSpins) {
        sched_yield();
        continue;
      }
#if defined(__SSE2__)
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  PhaseCounter* counter_;
};

}  // namespace fastlm::cpu
