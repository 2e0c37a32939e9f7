// Checksums of many spans of memory on the CPU. A line of eight words is added to running sums, and these to sums of
// their own, so that it counts where it stands; a piece's sums become one number, and the order of pieces does not matter.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "isa.h"
#include "team.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kLine = 64;               // bytes: a line of the cache
constexpr int64_t kPiece = int64_t(1) << 20;  // bytes that a thread takes

constexpr int64_t kAhead = 24;                 // lines of a sum that are on their way

struct Sums {
  uint64_t of[8], of_sums[8];

  void add(const char* line, int64_t bytes = kLine) {
    uint64_t words[8] = {};
    std::memcpy(words, line, size_t(bytes));
    for (int i = 0; i < 8; i++) of[i] += words[i], of_sums[i] += of[i];
  }
};

uint64_t mixed(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
  return hash ^ hash >> 29;
}

struct Piece {
  int64_t span, first, lines;
};

}  // namespace

void checksum(const Checksum& op, int threads) {
  const auto bytes_of = [&](int64_t span) { return op.spans[3 * span + 1]; };
  std::vector<Piece> pieces;
  for (int64_t span = 0; span < op.count; span++) {
    const int64_t lines = (bytes_of(span) + kLine - 1) / kLine;
    for (int64_t first = 0; first < lines; first += kPiece / kLine)
      pieces.push_back({span, first, std::min(kPiece / kLine, lines - first)});
  }
  std::array<uint64_t, kChecksums> totals{};
  in_team(threads, int64_t(pieces.size()), [&](Team&) {
    std::array<uint64_t, kChecksums> own{};
#pragma omp for schedule(dynamic, 1) nowait
    for (size_t i = 0; i < pieces.size(); i++) {
      const auto [span, first, lines] = pieces[i];
      const char* memory = reinterpret_cast<const char*>(op.spans[3 * span]);
      const int64_t apart = op.spans[3 * span + 2], end = first + lines;
      std::array<Sums, kChecksums> sums{};
      const auto add = [&](int64_t line, int64_t which) {
        const int64_t left = bytes_of(span) - line * kLine;
        left >= kLine ? sums[which].add(memory + line * kLine) : sums[which].add(memory + line * kLine, left);
      };
      if (op.only < 0) {
        for (int64_t line = first, which = first % apart; line < end; line++, which = which + 1 == apart ? 0 : which + 1)
          add(line, which);
      } else {
        const int64_t which = op.only % apart;
        for (int64_t line = first + (which - first % apart + apart) % apart; line < end; line += apart) {
          __builtin_prefetch(memory + (line + kAhead * apart) * kLine);  // no hardware's pattern: most lie pages apart
          add(line, which);
        }
      }
      for (int64_t k = op.only < 0 ? 0 : op.only; k < (op.only < 0 ? kChecksums : op.only + 1); k++) {
        uint64_t hash = uint64_t(i);
        const Sums& found = sums[k % apart];
        for (int word = 0; word < 8; word++) hash = mixed(mixed(hash, found.of[word]), found.of_sums[word]);
        own[k] += hash;
      }
    }
#pragma omp critical
    for (int64_t k = 0; k < kChecksums; k++) totals[k] += own[k];
  });
  for (int64_t k = 0; k < kChecksums; k++) op.sums[k] = int64_t(totals[k]);
}

}  // namespace fastlm::cpu::FASTLM_ISA
