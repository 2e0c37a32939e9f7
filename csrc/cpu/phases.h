// Phases of work in one OpenMP region, each cut into chunks.
//
// The chunks of a phase lie in as many runs as there are threads. A thread takes those of its own run in order, so that
// it reads on where it has read before, and then helps with the others'. A phase has ended when its chunks are done,
// not when all threads have come: a thread whose core was taken away holds up the others for no more than the chunk in
// its hands. Who waits spins a little, then yields its core.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace fastlm::cpu {

constexpr int kSpins = 4000;  // pauses, about 0.1 ms, before a waiting thread yields

// The counters of the phases of one call: per phase the chunks that are done, and those that were taken of every run.
class Phases {
 public:
  Phases(int64_t count, int runs) : runs_(runs), counters_(count * (runs + 1)) {}

 private:
  friend class Walk;
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  int runs_;
  std::vector<Counter> counters_;
};

// One thread's walk through the phases, from one on: every thread calls `run` for the same ones in the same order.
class Walk {
 public:
  Walk(Phases& phases, int thread, int64_t phase)
      : counters_(phases.counters_.data() + phase * (phases.runs_ + 1)), runs_(phases.runs_), thread_(thread),
        phase_(phase) {}

  // The phase that comes next.
  int64_t phase() const { return phase_; }

  template <class Body>
  void run(int64_t chunks, Body&& body) {
    auto& done = counters_[runs_].value;
    for (int i = 0; i < runs_; i++) {
      const int at = (thread_ + i) % runs_;
      const int64_t begin = at * chunks / runs_, end = (at + 1) * chunks / runs_;
      if (begin == end) continue;
      auto& taken = counters_[at].value;
      for (int64_t chunk; (chunk = begin + taken.fetch_add(1, std::memory_order_relaxed)) < end;) {
        body(chunk);
        done.fetch_add(1, std::memory_order_release);
      }
    }
    for (int spins = 0; done.load(std::memory_order_acquire) < chunks;) {
      if (++spins > kSpins) {
        sched_yield();
        continue;
      }
#if defined(__SSE2__)
      __builtin_ia32_pause();
#endif
    }
    counters_ += runs_ + 1;
    phase_++;
  }

 private:
  Phases::Counter* counters_;
  int runs_, thread_;
  int64_t phase_;
};

}  // namespace fastlm::cpu
