// What becomes of memory that is freed.
#pragma once

#if defined(__GLIBC__) || __has_include(<gnu/libc-version.h>)
#include <malloc.h>
#define FASTLM_HAS_MALLOPT
#endif

namespace fastlm::cpu {

// Freed memory stays with the process, and with `large` blocks above 32 MiB do too, which are otherwise mapped anew at
// every allocation: a training step frees what the next one allocates again. False where the C library has no such
// setting. It holds for the whole process.
inline bool keep_heap(bool large) {
#ifdef FASTLM_HAS_MALLOPT
  return mallopt(M_TRIM_THRESHOLD, -1) && mallopt(M_TOP_PAD, 64 << 20) && mallopt(M_MMAP_THRESHOLD, 32 << 20) &&
         mallopt(M_MMAP_MAX, large ? 0 : 65536);
#else
  return false;
#endif
}

}  // namespace fastlm::cpu
