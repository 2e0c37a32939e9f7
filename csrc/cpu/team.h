// Teams of threads, and when one thread alone is faster.
//
// A region of a team has ended when all its threads have come to the end. Where another process keeps a core busy, that
// is when the system's scheduler gives the core back, some milliseconds later, though what is to be done takes
// microseconds. So it is measured how long the caller of a region waits for the others: after one in which that took
// longer than to do all of the work alone, the caller works alone for a while, and then tries again.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace fastlm::cpu {

constexpr int64_t kLongWait = 500'000;  // ns; what is shorter may be the last piece of the work
constexpr int64_t kAlone = 20;          // times as long as was waited, so that trying again costs a twentieth
constexpr int64_t kLongest = 20'000'000;  // ns that count: the process itself may have been stopped

inline std::atomic<int64_t> alone_until{0};  // ns of the steady clock

namespace {  // each instruction set has its own

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// One region, for a team that the caller asks to be of so many threads; `pieces` is how often the work can be shared out.
class Team {
 public:
  Team(int threads, int64_t pieces)
      : begun_(threads > 1 ? now() : 0), threads_(begun_ < alone_until.load(std::memory_order_relaxed) ? 1 : threads),
        shared_(pieces >= 2 * threads) {}
  Team(const Team&) = delete;

  ~Team() {
    if (threads_ <= 1 || !shared_) return;
    const int64_t end = now(), waited = waited_ + end - left_, busy = end - begun_ - waited;
    if (waited > kLongWait && 2 * (end - begun_) > 3 * threads_ * busy)
      alone_until.store(end + kAlone * std::min(waited, kLongest), std::memory_order_relaxed);
  }

  int threads() const { return threads_; }

  // A barrier within the region.
  void wait() {
    const bool caller = omp_get_thread_num() == 0;
    const int64_t from = caller ? now() : 0;
#pragma omp barrier
    if (caller) waited_ += now() - from;
  }

  // What each thread ends with.
  void leave() {
    if (omp_get_thread_num() == 0) left_ = now();
  }

 private:
  const int64_t begun_;
  const int threads_;
  const bool shared_;
  int64_t waited_ = 0, left_ = 0;
};

}  // namespace

// body(team) by each thread.
template <class Body>
void in_team(int threads, int64_t pieces, Body&& body) {
  Team team(threads, pieces);
#pragma omp parallel num_threads(team.threads())
  {
    body(team);
    team.leave();
  }
}

}  // namespace fastlm::cpu
