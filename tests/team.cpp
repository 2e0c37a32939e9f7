// How many threads a team has after regions of several kinds: "late 1, tried again 2, …".
#include "cpu/team.h"

#include <cstdio>
#include <thread>

using namespace fastlm::cpu;

namespace {

void rest(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

void tell(const char* what) { std::printf("%s %d, ", what, Team(2, 100).threads()); }

// A region in which the caller works for `caller` ms, and another thread for `other`.
template <class End>
void region(int pieces, int caller, int other, End&& end) {
  alone_until = 0;
  in_team(2, pieces, [&](Team& team) {
    rest(omp_get_thread_num() == 0 ? caller : other);
    end(team);
  });
}

}  // namespace

int main() {
  const auto at_end = [](Team&) {};
  region(100, 0, 50, at_end);
  tell("late");
  region(100, 0, 50, [](Team& team) { team.wait(); });
  tell("late at a barrier");
  int counted = 0;
  in_team(2, 100, [&](Team& team) {
    team.wait();
    counted += team.threads();
  });
  std::printf("alone %d, ", counted);
  rest(kLongest / 1'000'000 * kAlone + 200);
  tell("tried again");
  region(100, 50, 50, at_end);
  tell("even");
  region(100, 50, 0, at_end);
  tell("the caller last");
  region(3, 0, 50, at_end);
  tell("few pieces");
  alone_until = 0;
  std::printf("one asked for %d\n", Team(1, 100).threads());
}
