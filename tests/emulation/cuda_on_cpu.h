// CUDA on the CPU, for tests: the same .cu, compiled by g++, one fiber for every CUDA thread of a block.
//
// A launch runs its blocks one after another. A fiber runs until it reaches a barrier (__syncthreads, a shuffle), then
// the scheduler goes on with another; EMU_ORDER says in which order (0 forward, 1 reverse, from 2 on a random seed), so that
// a barrier that is missing shows in some order. Shared memory is filled with a pattern before every block, since a
// real block finds what another left. Under AddressSanitizer each fiber's stack is announced, so that its reports
// are right. Neither speed nor the memory model is emulated. Compile with -fno-strict-aliasing.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include "cuda_types.h"

// ---- fibers

extern "C" void emu_switch(void** save, void* to);
#ifdef EMU_IMPLEMENTATION
// Saves the callee's registers on this stack and continues on the other (System V, x86-64).
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
#endif

namespace emu {

constexpr size_t kStack = 128 * 1024;
constexpr int kWarp = 32;

enum class State { ready, at_warp_barrier, at_block_barrier, done };

struct Copy { void* to; const void* from; };

struct Fiber {
  void* stack_pointer;
  char* stack;
  uint3 index;
  int lane, warp;
  State state;
  unsigned mask;     // lanes that the warp barrier waits for
  int turn;          // which of a warp's two exchange slots is next
  void* fake_stack;  // AddressSanitizer's
  std::vector<Copy> copies;  // asynchronous ones that nobody has waited for
};

// What the lanes of a warp hand each other; two turns, so that a fast lane cannot overwrite what a slow one reads.
struct Exchange { unsigned char value[2][kWarp][32]; };

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Exchange> exchanges;
  dim3 grid, block;
  uint3 index;
  std::unique_ptr<char, void (*)(void*)> shared{nullptr, free};  // dynamic, of its exact size: beyond it lies a redzone
  size_t shared_size = 0;
  const std::function<void()>* body;
  Fiber* current;
  void* scheduler;
  void* scheduler_fake = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};

inline Block* running = nullptr;

// Shared memory registers itself where a kernel first reaches it, and is filled before each later block.
struct SharedRegion { void* p; size_t size; };
inline std::vector<SharedRegion>& shared_regions() {
  static std::vector<SharedRegion> regions;
  return regions;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u, %u, %u)\n", what, running->index.x, running->index.y,
               running->index.z);
  std::abort();
}

inline void to_scheduler() {
  Fiber* fiber = running->current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber->state == State::done ? nullptr : &fiber->fake_stack,
                                 running->scheduler_stack, running->scheduler_stack_size);
#endif
  emu_switch(&fiber->stack_pointer, running->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber->fake_stack, &running->scheduler_stack, &running->scheduler_stack_size);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &running->scheduler_stack, &running->scheduler_stack_size);
#endif
  (*running->body)();
  running->current->state = State::done;
  to_scheduler();
  std::abort();
}

inline void resume(Fiber& fiber) {
  running->current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&running->scheduler_fake, fiber.stack, kStack);
#endif
  emu_switch(&running->scheduler, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(running->scheduler_fake, nullptr, nullptr);
#endif
}

inline int order() {
  const char* text = std::getenv("EMU_ORDER");
  return text ? std::atoi(text) : 0;
}

inline void prepare(Block& block, int threads) {
  // Kept from launch to launch: pages that are new at every one would take most of a sweep's time.
  static std::unique_ptr<char, void (*)(void*)> stacks{nullptr, free};
  static size_t stacks_size = 0;
  const size_t size = size_t(threads) * kStack;
  if (stacks_size < size) {
    stacks.reset(static_cast<char*>(std::aligned_alloc(4096, size)));
    stacks_size = size;
  }
  block.fibers.resize(threads);
  block.exchanges.resize((threads + kWarp - 1) / kWarp);
  for (int i = 0; i < threads; i++) {
    const unsigned u = i;
    char* stack = stacks.get() + size_t(i) * kStack;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack, kStack);
#endif
    void** top = reinterpret_cast<void**>(stack + kStack - 64);
    *--top = nullptr;  // fiber_main has no caller
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    const uint3 index = {u % block.block.x, u / block.block.x % block.block.y, u / block.block.x / block.block.y};
    block.fibers[i] = {top, stack, index, i % kWarp, i / kWarp, State::ready, 0, 0, nullptr, {}};
  }
  for (const SharedRegion& region : shared_regions()) std::memset(region.p, 0xff, region.size);
  if (block.shared) std::memset(block.shared.get(), 0xff, block.shared_size);
}

// Lets the lanes of one warp go on whose barrier is complete: every lane it names waits there or has ended.
inline bool release_warp(Fiber* lanes, int count) {
  unsigned waiting = 0, live = 0;
  for (int l = 0; l < count; l++) {
    if (lanes[l].state == State::at_warp_barrier) waiting |= 1u << l;
    if (lanes[l].state != State::done) live |= 1u << l;
  }
  for (int l = 0; l < count; l++) {
    const unsigned mask = lanes[l].mask;
    if (!(waiting >> l & 1) || (mask & live & ~waiting)) continue;
    for (int k = 0; k < count; k++)
      if ((mask >> k & 1) && lanes[k].state == State::at_warp_barrier) lanes[k].state = State::ready;
    return true;
  }
  return false;
}

inline void run_block(Block& block) {
  running = &block;
  const int threads = block.block.x * block.block.y * block.block.z, warps = (threads + kWarp - 1) / kWarp;
  prepare(block, threads);
  std::vector<int> warp_order(warps), lane_order(kWarp);
  for (int i = 0; i < warps; i++) warp_order[i] = order() == 1 ? warps - 1 - i : i;
  for (int i = 0; i < kWarp; i++) lane_order[i] = order() == 1 ? kWarp - 1 - i : i;
  std::mt19937 random(order() + block.index.x * 7919u);
  for (;;) {
    if (order() > 1) {
      std::shuffle(warp_order.begin(), warp_order.end(), random);
      std::shuffle(lane_order.begin(), lane_order.end(), random);
    }
    for (const int warp : warp_order) {
      Fiber* lanes = &block.fibers[warp * kWarp];
      const int count = std::min(kWarp, threads - warp * kWarp);
      for (bool moved = true; moved;) {
        moved = false;
        for (const int l : lane_order)
          if (l < count && lanes[l].state == State::ready) {
            resume(lanes[l]);
            moved = true;
          }
        if (!moved) moved = release_warp(lanes, count);
      }
    }
    int at_block = 0, done = 0;
    for (const Fiber& fiber : block.fibers) {
      at_block += fiber.state == State::at_block_barrier;
      done += fiber.state == State::done;
    }
    if (done == threads) break;
    if (at_block + done != threads) fail("deadlock: a shuffle names lanes that never come");
    if (done) fail("__syncthreads is reached by a part of the block only");
    for (Fiber& fiber : block.fibers) fiber.state = State::ready;
  }
  running = nullptr;
}

inline void warp_barrier(unsigned mask) {
  Fiber* fiber = running->current;
  if (!(mask >> fiber->lane & 1)) fail("a lane calls a warp function whose mask leaves it out");
  fiber->state = State::at_warp_barrier;
  fiber->mask = mask;
  to_scheduler();
}

// Shows a value to the warp; what its other lanes show is read by `shown`, until this lane shows again twice.
template <class T>
auto& show(unsigned mask, const T& value) {
  static_assert(sizeof(T) <= 32);
  Fiber* fiber = running->current;
  auto& slot = running->exchanges[fiber->warp].value[fiber->turn];
  fiber->turn ^= 1;
  std::memcpy(slot[fiber->lane], &value, sizeof(T));
  warp_barrier(mask);
  return slot;
}

template <class T>
T shown(const unsigned char* value) {
  T other;
  std::memcpy(&other, value, sizeof(T));
  return other;
}

template <class T>
T exchange(unsigned mask, T value, int source) {
  const auto& slot = show(mask, value);
  return mask >> (source & 31) & 1 ? shown<T>(slot[source & 31]) : value;
}

template <class Body>
void launch(dim3 grid, dim3 threads, size_t shared, Body&& body) {
  const std::function<void()> run(body);
  Block block;
  void* memory = nullptr;
  if (shared && posix_memalign(&memory, 16, shared)) std::abort();
  block.shared.reset(static_cast<char*>(memory));
  block.shared_size = shared;
  block.grid = grid;
  block.block = threads;
  block.body = &run;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        block.index = {x, y, z};
        run_block(block);
      }
}

// Dynamic shared memory that a block may have, as on sm_90; a test lowers it.
inline int shared_limit = 227 * 1024 - 256;

// A __shared__ variable: static, and announced once.
template <class T>
struct Shared {
  alignas(16) T value;
  Shared() { shared_regions().push_back({&value, sizeof(T)}); std::memset(&value, 0xff, sizeof(T)); }
};

}  // namespace emu

#define threadIdx (emu::running->current->index)
#define blockIdx (emu::running->index)
#define blockDim (emu::running->block)
#define gridDim (emu::running->grid)
#define FASTLM_SHARED(type, name, count)           \
  static emu::Shared<type[count]> name##_storage; \
  type(&name)[count] = name##_storage.value
#define FASTLM_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emu::running->shared.get())
#define FASTLM_LAUNCH(kernel, grid, block, stream, ...) \
  FASTLM_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)
#define FASTLM_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  ((void)(stream), emu::launch(grid, block, bytes, [=] { kernel(__VA_ARGS__); }))

namespace fastlm::cuda {
inline int shared_limit() { return emu::shared_limit; }
}

inline void __syncthreads() {
  emu::running->current->state = emu::State::at_block_barrier;
  emu::to_scheduler();
}
inline void __syncwarp(unsigned mask = ~0u) { emu::warp_barrier(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) { return emu::exchange(mask, value, source); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emu::exchange(mask, value, emu::running->current->lane ^ bits);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const int lane = emu::running->current->lane, from = lane + int(by);
  return emu::exchange(mask, value, from < emu::kWarp ? from : lane);
}
