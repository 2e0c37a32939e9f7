// What a kernel boundary costs a decode step of GPT-2 124M, and what hides it. JSON rows on stdout.
//
//   node        an all but empty kernel: on a stream, in a graph of 200, the same with programmatic dependent launch
//               (trigger first, then wait). A "counted" node adds 1 to what the one before it wrote.
//   bandwidth   one kernel reads or copies 1 GiB, rereads what fits the second-level cache, or reads the weights of
//               four tokens (679 MB): the floor of what follows.
//   chain       four tokens as a graph of 240 kernels, five a layer: qkv, attention (no weights), projection, up,
//               down. Each streams its own weights and needs every output of the kernel before, in 32-bit integers:
//                   out[k, b] = sum_{w in slice b of stage k} w p[k]  + [b == 0] p[k],   p[k] = mix(sum_b out[k-1, b])
//               so that one value, from sums taken on the host, is right for every grid. "sms x 2" is a grid, "9
//               loads" is as many blocks as leave a thread nine (24 rows of 768); variants say where the wait stands
//               and which later kernel's weights are prefetched.
//   persistent  the stages in one cooperative kernel, a barrier over the grid between them; weights arrive by cp.async
//               in a ring of shared memory, `depth` stages ahead.
//   barrier     1000 such barriers with nothing between them.
//
// Times are events around a replay, behind a kernel long enough for the host to run ahead. Weights are random and not
// read twice in a replay; outputs are poisoned; each replay starts from the result of the last, so that a stale or
// missing output, or a wait that does not wait, changes the value that is checked. Times of a chain are per token (60
// kernels), lost_us = (median - floor) / 60 for each of them, host_us is what launching cost the host.
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -cudart static -o launches launches.cu
//   ./launches [--quick]
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace {

constexpr int kThreads = 256, kHeld = 9, kStages = 240, kTokens = 4, kRow = 1024, kPolls = 1 << 21, kWarmUp = 3;
constexpr uint32_t kVectors = 1u << 26, kLayer = 884736, kUsed = kTokens * 12 * kLayer;      // in 16-byte vectors
constexpr uint32_t kQkv = 221184, kProjection = 73728, kUp = 294912, kSeed = 20240607;

enum Wait { kPlain, kWaitFirst, kLoadsFirst, kOwnFirst };        // where the wait for the kernel before stands
enum Ahead { kNothing, kSectors, kLines, kBulk, kBulkLast };     // how a later kernel's weights are prefetched
struct Span { uint32_t begin, end; };
struct Sync { uint32_t counter, pad[31], flags[kRow], error; };
struct Stage {
  const uint4 *w, *next;              // (n,), (next_n,)   its own weights, and those it prefetches
  const uint32_t* prev;               // (prev_n,)
  uint32_t *out, n, share, next_n, next_share, prev_n;           // out (gridDim.x,)
};

__host__ __device__ inline uint32_t size_of(int k) {
  return k % 5 == 0 ? kQkv : k % 5 == 1 ? 0 : k % 5 == 2 ? kProjection : kUp;
}
__host__ __device__ inline uint32_t offset_of(int k) {
  return k / 5 * kLayer + (k % 5 > 0 ? kQkv : 0) + (k % 5 > 2 ? kProjection : 0) + (k % 5 > 3 ? kUp : 0);
}
__host__ __device__ inline uint32_t mix(uint32_t x) {
  x += 0x9e3779b9u;
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
__host__ __device__ inline uint32_t share_of(uint32_t n, uint32_t blocks) {                // in whole 128-byte lines
  return (n / 8 + blocks - 1) / blocks * 8;
}
__device__ Span span(uint32_t n, uint32_t share) {               // this block's part of n vectors
  const uint32_t begin = min(blockIdx.x * share, n);
  return {begin, min(begin + share, n)};
}
// Not ld.global.nc: ptxas moves those below the wait and the barriers, volatile or not, until three are in flight.
__device__ uint4 load(const uint4* at, bool inside) {
  uint4 v;
  asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
               "@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(at), "r"(int(inside)));
  return v;
}
__device__ uint32_t add(uint32_t w, uint32_t p, uint32_t sum) {  // in assembly, or it becomes p (w + w + ...)
  asm("mad.lo.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(w), "r"(p));
  return sum;
}
__device__ uint32_t add(uint4 w, uint32_t p, uint32_t sum) {
  return add(w.w, p, add(w.z, p, add(w.y, p, add(w.x, p, sum))));
}
#if __CUDA_ARCH__ >= 900
__device__ void let_next_start() { cudaTriggerProgrammaticLaunchCompletion(); }
__device__ void wait_for_kernel() { cudaGridDependencySynchronize(); }
#else
__device__ void let_next_start() {}
__device__ void wait_for_kernel() {}
#endif
template <int kAhead>
__device__ void prefetch(const uint4* base, Span share) {
  constexpr uint32_t kStep = kAhead == kSectors ? 2 : 8;
  if (kAhead == kSectors || kAhead == kLines)
    for (uint32_t i = share.begin + threadIdx.x * kStep; i < share.end; i += kThreads * kStep)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(base + i) : "memory");
#if __CUDA_ARCH__ >= 900
  if ((kAhead == kBulk || kAhead == kBulkLast) && threadIdx.x == 0 && share.begin < share.end)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(base + share.begin)),
                 "r"((share.end - share.begin) * 16) : "memory");
#endif
}
// The sum over a block's threads, in every thread. Two calls in a row need two arrays.
__device__ uint32_t block_sum(uint32_t v, uint32_t* of_warp) {
  v = __reduce_add_sync(~0u, v);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  return __reduce_add_sync(~0u, threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : 0);
}
// A thread's part of the outputs before, from the second-level cache: other blocks have just written them.
__device__ uint32_t outputs(const uint32_t* prev, uint32_t n) {
  uint32_t sum = 0;
  for (uint32_t i = threadIdx.x, j = 0; j < 3; i += blockDim.x, j++) sum += i < n ? __ldcg(prev + i) : 0;
  return sum;
}

template <bool kCounted, bool kDependent>
__global__ void node_kernel(uint32_t* count) {
  if (kDependent) let_next_start();
  if (kDependent) wait_for_kernel();
  if (kCounted && blockIdx.x == 0 && threadIdx.x == 0) __stcg(count, __ldcg(count) + 1);
}
__global__ void fill_kernel(uint32_t* w) {
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < kVectors * 4; i += gridDim.x * blockDim.x) w[i] = mix(i);
}

// Blocks change places from pass to pass, so that a pass finds nothing in the first-level cache.
template <bool kCopy>
__global__ void __launch_bounds__(kThreads, 4) stream_kernel(const uint4* a, uint4* b, uint32_t n, int passes,
                                                             uint32_t* out) {
  __shared__ uint32_t of_warp[32];
  const uint32_t stride = gridDim.x * kThreads;
  uint32_t sum = 0;
  for (int pass = 0; pass < passes; pass++)
    for (uint32_t i = (blockIdx.x + pass * 37) % gridDim.x * kThreads + threadIdx.x; i < n; i += 8 * stride) {
      uint4 v[8];
      for (int u = 0; u < 8; u++) v[u] = load(a + i + u * stride, i + u * stride < n);
      for (int u = 0; u < 8; u++)
        if (!kCopy) sum = add(v[u], 1, sum);
        else if (i + u * stride < n) b[i + u * stride] = v[u];
    }
  if (!kCopy) sum = block_sum(sum, of_warp);
  if (!kCopy && threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <int kWait, int kAhead>
__global__ void __launch_bounds__(kThreads) stage_kernel(const Stage s) {
  __shared__ uint32_t of_warp[2][32];
  const Span mine = span(s.n, s.share), next = span(s.next_n, s.next_share);
  const uint32_t first = mine.begin + threadIdx.x;
  if (kWait != kPlain) let_next_start();
  if (kWait == kOwnFirst) prefetch<kBulk>(s.w, mine);
  if (kWait == kWaitFirst || kWait == kOwnFirst) wait_for_kernel();
  uint4 w[kHeld];
  for (int u = 0; u < kHeld; u++) w[u] = load(s.w + first + u * kThreads, first + u * kThreads < mine.end);
  if (kAhead != kBulkLast) prefetch<kAhead>(s.next, next);
  if (kWait == kLoadsFirst) wait_for_kernel();
  const uint32_t p = mix(block_sum(outputs(s.prev, s.prev_n), of_warp[0]));
  uint32_t sum = 0;
  for (int u = 0; u < kHeld; u++) sum = add(w[u], p, sum);
  for (uint32_t i = first + kHeld * kThreads; i < mine.end; i += kThreads) sum = add(load(s.w + i, true), p, sum);
  sum = block_sum(sum, of_warp[1]);
  if (threadIdx.x == 0) __stcg(s.out + blockIdx.x, sum + (blockIdx.x == 0 ? p : 0));
  if (kAhead == kBulkLast) prefetch<kAhead>(s.next, next);
}

__device__ bool reached(const uint32_t* at, uint32_t target) {   // bounded, so that no bug can hang the device
#pragma unroll 1
  for (int poll = 0; poll < kPolls; poll++) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    if (int32_t(value - target) >= 0) return true;
  }
  return false;
}
// By one counter, or by a flag a block that every block polls. Orders what thread `syncer` wrote before; true in
// every thread of a block that waited in vain.
template <bool kFlags>
__device__ bool grid_barrier(Sync* sync, uint32_t epoch, int syncer) {
  const int from = int(threadIdx.x) - syncer;
  bool late = false;
  if (kFlags) {
    if (from == 0)
      asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(sync->flags + blockIdx.x), "r"(epoch) : "memory");
    for (int i = from; from >= 0 && i < int(gridDim.x); i += blockDim.x - syncer)
      late = late || !reached(sync->flags + i, epoch);
  } else if (from == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(&sync->counter) : "memory");
    late = !reached(&sync->counter, epoch * gridDim.x);
  }
  if (late) sync->error = 1;
  return __syncthreads_or(late);
}
template <bool kFlags>
__global__ void __launch_bounds__(kThreads) barrier_kernel(Sync* sync, uint32_t epoch, int rounds) {
  bool failed = __syncthreads_or(sync->error);
  for (int round = 1; round <= rounds && !failed; round++) failed = grid_barrier<kFlags>(sync, epoch + round, 0);
}

// 256 threads stream weights. With 288 the last warp does nothing but the barrier: the fences of its release and its
// acquire then have no loads of its own to wait for. A thread reads only what it copied itself.
template <int kDepth, bool kFlags>
__global__ void __launch_bounds__(kThreads + 32) persistent_kernel(const uint4* w, uint32_t* outs, Sync* sync,
                                                                   uint32_t epoch, int slot) {
  extern __shared__ uint4 ring[];                                // (kDepth + 1, slot, kThreads)
  __shared__ uint32_t of_warp[2][32];
  const int tid = threadIdx.x, syncer = blockDim.x > kThreads ? kThreads : 0;
  const uint32_t qkv = share_of(kQkv, gridDim.x), projection = share_of(kProjection, gridDim.x);
  const uint32_t up = share_of(kUp, gridDim.x);
  auto part_of = [&](int k) {
    return span(k < kStages && tid < kThreads ? size_of(k) : 0, k % 5 == 0 ? qkv : k % 5 == 2 ? projection : up);
  };
  auto fetch = [&](int k) {
    const Span mine = part_of(k);
    uint4* to = ring + k % (kDepth + 1) * slot * kThreads + tid;
    for (uint32_t i = mine.begin + tid; i < mine.end; i += kThreads, to += kThreads)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
                   "l"(__cvta_generic_to_global(w + offset_of(k) + i)) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  if (__syncthreads_or(sync->error)) return;
  for (int k = 0; k < kDepth; k++) fetch(k);
  for (int k = 0; k < kStages; k++) {
    uint32_t p = outputs(outs + (k + kStages - 1) % kStages * kRow, gridDim.x), sum = 0;
    fetch(k + kDepth);
    p = mix(block_sum(p, of_warp[0]));
    asm volatile("cp.async.wait_group %0;" ::"n"(kDepth) : "memory");
    const Span mine = part_of(k);
    const uint4* from = ring + k % (kDepth + 1) * slot * kThreads + tid;
    for (uint32_t i = mine.begin + tid; i < mine.end; i += kThreads, from += kThreads) sum = add(*from, p, sum);
    sum = block_sum(sum, of_warp[1]);
    if (tid == syncer) __stcg(outs + k * kRow + blockIdx.x, sum + (blockIdx.x == 0 ? p : 0));
    if (grid_barrier<kFlags>(sync, epoch + k + 1, syncer)) return;
  }
}

enum Kind { kOrdinary, kDependentLaunch, kCooperative };
struct Times { double median, min, max, host; };
struct Grid { const char* name; int per_sm, loads; };
cudaStream_t stream;
cudaEvent_t start, stop;
uint4 *w, *copied;                                               // (kVectors,)
uint32_t *outs, *scratch, sums[kStages];                         // (kStages, kRow), (4 kRow,); a stage's sum of words
Sync* sync_state;
int sms, repeats = 25, failures = 0;
double floor_us = 1e30;                                          // of a token

template <class... A>
std::string text(const char* format, A... values) {
  char line[512];
  snprintf(line, sizeof line, format, values...);
  return line;
}
void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(text("%s: %s", what, cudaGetErrorString(error)));
}
#define CHECK(call) check(call, #call)

uint32_t host_sum(uint32_t begin, uint32_t vectors) {            // of the words
  uint32_t sum = 0;
  for (uint32_t i = begin * 4; i != (begin + vectors) * 4; i++) sum += mix(i);
  return sum;
}
void sum_is(const uint32_t* at, int n, uint32_t right) {
  std::vector<uint32_t> values(n);
  CHECK(cudaMemcpyAsync(values.data(), at, n * 4, cudaMemcpyDeviceToHost, stream));
  CHECK(cudaStreamSynchronize(stream));
  for (uint32_t value : values) right -= value;
  if (right) throw std::runtime_error(text("the result is wrong by %u", right));
}
template <class... A, class... B>
void launch(Kind kind, void (*kernel)(A...), int blocks, int threads, size_t shared, B... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = kind == kCooperative ? cudaLaunchAttributeCooperative
                                      : cudaLaunchAttributeProgrammaticStreamSerialization;
  if (kind == kCooperative) attribute.val.cooperative = 1;
  else attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {dim3(blocks), dim3(threads), shared, stream, &attribute, kind != kOrdinary};
  CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}
std::function<void()> captured(const std::function<void()>& record) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  record();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  std::shared_ptr<CUgraphExec_st> owner(exec, cudaGraphExecDestroy);
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaGraphUpload(exec, stream));
  return [owner] { CHECK(cudaGraphLaunch(owner.get(), stream)); };
}
// Microseconds a unit, of `units` a call. The host has the time of `leads` reads of 394 MB (125 us each) to launch.
Times timed(double units, int leads, const std::function<void()>& call) {
  std::vector<double> us, host;
  for (int repeat = -kWarmUp; repeat < repeats; repeat++) {
    for (int i = 0; i < leads; i++)
      launch(kOrdinary, stream_kernel<false>, sms * 4, kThreads, 0, w + kUsed, nullptr, kVectors - kUsed, 1, scratch);
    CHECK(cudaEventRecord(start, stream));
    const auto from = std::chrono::steady_clock::now();
    call();
    host.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - from).count() / units);
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaEventSynchronize(stop));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (repeat >= 0) us.push_back(ms * 1e3 / units);
  }
  std::sort(us.begin(), us.end());
  std::sort(host.begin(), host.end());
  return {us[us.size() / 2], us.front(), us.back(), host[host.size() / 2]};
}
// One row. Where its part fails, the row holds the sentence, and the rest goes on while the context lives.
void part(const char* what, const std::string& about, const char* unit, double bytes,
          const std::function<Times()>& body) {
  try {
    const Times t = body();
    printf("{\"what\": \"%s\", %s, \"median_us\": %.4f, \"min_us\": %.4f, \"max_us\": %.4f, \"unit\": \"us per %s\", "
           "\"host_us\": %.4f", what, about.c_str(), t.median, t.min, t.max, unit, t.host);
    if (bytes) printf(", \"gb_s\": %.0f", bytes / t.median * 1e-3);
    if (!strcmp(unit, "token")) printf(", \"floor_us\": %.2f, \"lost_us\": %.3f", floor_us, (t.median - floor_us) / 60);
    printf("}\n");
  } catch (const std::exception& error) {
    cudaGraph_t graph;
    cudaStreamEndCapture(stream, &graph);                        // an error of its own where nothing is being captured
    cudaGetLastError();
    failures++;
    printf("{\"what\": \"%s\", %s, \"failed\": \"%s\"}\n", what, about.c_str(), error.what());
    fprintf(stderr, "launches: %s, %s: %s\n", what, about.c_str(), error.what());
    check(cudaDeviceSynchronize(), "the context is lost");
  }
  fflush(stdout);
}
// Poisons, runs once and checks, times and checks again. `blocks` is the grid of the last stage.
Times timed_chain(int blocks, const std::function<void()>& call) {
  uint32_t sum = kSeed, *last = outs + (kStages - 1) * kRow;
  CHECK(cudaMemsetAsync(outs, 0xEE, kStages * kRow * 4, stream));
  CHECK(cudaMemsetAsync(last, 0, blocks * 4, stream));
  CHECK(cudaMemcpyAsync(last, &kSeed, 4, cudaMemcpyHostToDevice, stream));
  call();
  for (int k = 0; k < kStages; k++) sum = mix(sum) * (sums[k] + 1);
  sum_is(last, blocks, sum);
  const Times t = timed(kTokens, 5, call);
  for (int k = 0; k < kStages * (kWarmUp + repeats); k++) sum = mix(sum) * (sums[k % kStages] + 1);
  sum_is(last, blocks, sum);
  return t;
}

template <bool kCounted>
void nodes(const char* how, int count, bool dependent, int blocks, int threads) {
  uint32_t* counter = scratch + kRow * 3;
  auto* kernel = dependent ? node_kernel<kCounted, true> : node_kernel<kCounted, false>;
  part("node", text("\"how\": \"%s\", \"counted\": %d, \"blocks\": %d, \"threads\": %d", how, kCounted, blocks,
       threads), "node", 0, [&] {
    const auto all = [&] {
      for (int i = 0; i < count; i++)
        launch(dependent && i ? kDependentLaunch : kOrdinary, kernel, blocks, threads, 0, counter);
    };
    CHECK(cudaMemsetAsync(counter, 0, 4, stream));
    const bool plain = !strcmp(how, "stream");
    const Times t = plain ? timed(count, 16, all) : timed(count, 5, captured(all));
    sum_is(counter, 1, kCounted * count * (kWarmUp + repeats));
    return t;
  });
}

// Reads `n` vectors `passes` times, or copies them once.
template <bool kCopy>
void stream_rows(const char* how, uint32_t n, int passes, double passes_a_unit, const char* unit, uint32_t right) {
  uint32_t* out = scratch + kRow * 4;
  for (int per_sm : {1, 2, 4, 8}) {
    const int blocks = sms * per_sm;
    part("bandwidth", text("\"how\": \"%s\", \"mb\": %.1f, \"blocks\": %d", how, n * 16e-6, blocks), unit,
         n * passes_a_unit * (kCopy ? 32.0 : 16.0), [&] {
      CHECK(cudaMemsetAsync(scratch, 0xEE, kRow * 8 * 4, stream));
      if (kCopy) CHECK(cudaMemsetAsync(copied, 0xEE, n * 16ull, stream));
      const Times t = timed(passes / passes_a_unit, 5, [&] {
        launch(kOrdinary, stream_kernel<kCopy>, blocks, kThreads, 0, w, copied, n, passes, out);
      });
      if (kCopy) launch(kOrdinary, stream_kernel<false>, blocks, kThreads, 0, copied, nullptr, n, 1, out);
      sum_is(out, blocks, right * passes);
      if (!strcmp(unit, "token")) floor_us = std::min(floor_us, t.median);
      return t;
    });
  }
}

struct Variant { const char* name; void (*kernel)(Stage); bool dependent; int ahead; };
constexpr Variant kVariants[] = {
    {"plain", stage_kernel<kPlain, kNothing>, false, 0},
    {"dependent, wait first", stage_kernel<kWaitFirst, kNothing>, true, 0},
    {"dependent, loads first", stage_kernel<kLoadsFirst, kNothing>, true, 0},
    {"dependent, own bulk prefetch first", stage_kernel<kOwnFirst, kNothing>, true, 0},
    {"plain, prefetch by 32 B", stage_kernel<kPlain, kSectors>, false, 1},
    {"plain, prefetch by 128 B", stage_kernel<kPlain, kLines>, false, 1},
    {"plain, bulk prefetch", stage_kernel<kPlain, kBulk>, false, 1},
    {"plain, bulk prefetch", stage_kernel<kPlain, kBulk>, false, 2},
    {"plain, bulk prefetch", stage_kernel<kPlain, kBulk>, false, 5},
    {"plain, bulk prefetch last", stage_kernel<kPlain, kBulkLast>, false, 1},
    {"dependent, loads first, prefetch by 32 B", stage_kernel<kLoadsFirst, kSectors>, true, 1},
    {"dependent, loads first, bulk prefetch", stage_kernel<kLoadsFirst, kBulk>, true, 1},
    {"dependent, loads first, bulk prefetch", stage_kernel<kLoadsFirst, kBulk>, true, 2},
    {"dependent, loads first, bulk prefetch", stage_kernel<kLoadsFirst, kBulk>, true, 5},
    {"plain", stage_kernel<kPlain, kNothing>, false, 0},             // again: the spread
};

// `loads` 16-byte loads a thread, or where that is 0, `per_sm` blocks on each multiprocessor.
void chain(const Variant& variant, int per_sm, int loads) {
  const auto blocks_of = [&](int k) {
    return loads ? std::max<int>(12, (size_of(k) + loads * kThreads - 1) / (loads * kThreads)) : sms * per_sm;
  };
  const std::string grid = loads ? text("%d loads", loads) : text("sms x %d", per_sm);
  part("chain", text("\"variant\": \"%s\", \"ahead\": %d, \"grid\": \"%s\", \"blocks\": [%d, %d, %d, %d, %d]",
       variant.name, variant.ahead, grid.c_str(), blocks_of(0), blocks_of(1), blocks_of(2), blocks_of(3), blocks_of(4)),
       "token", 12.0 * kLayer * 16, [&] {
    return timed_chain(blocks_of(kStages - 1), captured([&] {
      for (int k = 0; k < kStages; k++) {
        const int before = (k + kStages - 1) % kStages, next = k + variant.ahead;
        const uint32_t blocks = blocks_of(k), n = size_of(k), next_n = next < kStages ? size_of(next) : 0;
        launch(variant.dependent && k ? kDependentLaunch : kOrdinary, variant.kernel, blocks, kThreads, 0,
               Stage{w + offset_of(k), w + offset_of(next), outs + before * kRow, outs + k * kRow, n,
                     share_of(n, blocks), next_n, share_of(next_n, blocks), uint32_t(blocks_of(before))});
      }
    }));
  });
}

// Blocks that wait for each other must lie on the device together.
template <class Kernel>
void all_resident(Kernel* kernel, int per_sm, int threads, size_t shared) {
  int room = 0;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&room, kernel, threads, shared));
  if (room < per_sm) throw std::runtime_error(text("a multiprocessor holds %d blocks of the %d wanted", room, per_sm));
}
template <int kDepth, bool kFlags>
void persistent(int per_sm, int threads) {
  const int blocks = sms * per_sm, slot = (share_of(kUp, blocks) + kThreads - 1) / kThreads;
  const size_t shared = size_t(kDepth + 1) * slot * kThreads * 16;
  uint32_t epoch = 0;
  part("persistent", text("\"depth\": %d, \"barrier\": \"%s\", \"threads\": %d, \"blocks\": %d, \"shared_kb\": %d",
       kDepth, kFlags ? "flags" : "counter", threads, blocks, int(shared / 1024)), "token", 12.0 * kLayer * 16, [&] {
    all_resident(persistent_kernel<kDepth, kFlags>, per_sm, threads, shared);
    CHECK(cudaMemsetAsync(sync_state, 0, sizeof(Sync), stream));
    return timed_chain(blocks, [&] {
      launch(kCooperative, persistent_kernel<kDepth, kFlags>, blocks, threads, shared, w, outs, sync_state, epoch,
             slot);
      epoch += kStages;
    });
  });
}
template <bool kFlags>
void barriers(int per_sm) {
  const int blocks = sms * per_sm, rounds = 1000;
  uint32_t epoch = 0;
  part("barrier", text("\"barrier\": \"%s\", \"blocks\": %d", kFlags ? "flags" : "counter", blocks), "barrier", 0, [&] {
    all_resident(barrier_kernel<kFlags>, per_sm, kThreads, 0);
    CHECK(cudaMemsetAsync(sync_state, 0, sizeof(Sync), stream));
    const Times t = timed(rounds, 5, [&] {
      launch(kCooperative, barrier_kernel<kFlags>, blocks, kThreads, 0, sync_state, epoch, rounds);
      epoch += rounds;
    });
    sum_is(&sync_state->error, 1, 0);
    sum_is(kFlags ? sync_state->flags : &sync_state->counter, kFlags ? blocks : 1, epoch * blocks);
    return t;
  });
}

void measure() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  CHECK(cudaMalloc(&w, kVectors * 16ull));
  CHECK(cudaMalloc(&copied, kVectors * 16ull));
  CHECK(cudaMalloc(&outs, kStages * kRow * 4));
  CHECK(cudaMalloc(&scratch, kRow * 8 * 4));
  CHECK(cudaMalloc(&sync_state, sizeof(Sync)));
  sms = device.multiProcessorCount;
  const bool hopper = device.major >= 9;
  printf("{\"what\": \"device\", \"name\": \"%s\", \"capability\": \"%d.%d\", \"sms\": %d, \"l2_mb\": %.1f, "
         "\"repeats\": %d}\n", device.name, device.major, device.minor, sms, device.l2CacheSize * 1e-6, repeats);
  launch(kOrdinary, fill_kernel, sms * 8, 1024, 0, reinterpret_cast<uint32_t*>(w));
  uint32_t used = 0;
  for (int k = 0; k < kStages; k++) used += sums[k] = host_sum(offset_of(k), size_of(k));
  const uint32_t whole = used + host_sum(kUsed, kVectors - kUsed);

  stream_rows<false>("read", kVectors, 1, 1, "pass", whole);
  stream_rows<true>("copy", kVectors, 1, 1, "pass", whole);
  stream_rows<false>("reread", 1 << 20, 100, 1, "pass", host_sum(0, 1 << 20));
  stream_rows<false>("reread", 1 << 21, 100, 1, "pass", host_sum(0, 1 << 21));
  stream_rows<false>("weights of a token", kUsed, 1, 1.0 / kTokens, "token", used);

  if (!hopper) printf("{\"what\": \"dependent launch\", \"failed\": \"needs compute capability 9.0\"}\n");
  for (int blocks : {1, sms})
    for (const auto& [how, count, dependent] : {std::tuple("stream", 500, false), {"graph of one", 1, false},
                                                {"graph", 200, false}, {"graph, dependent launch", 200, true}}) {
      if (dependent && !hopper) continue;
      nodes<false>(how, count, dependent, blocks, blocks == 1 ? 32 : 256);
      nodes<true>(how, count, dependent, blocks, blocks == 1 ? 32 : 256);
    }
  for (const Variant& variant : kVariants)
    for (int grid : {-1, -2, 9, 4, 2})
      if (hopper || !variant.dependent) chain(variant, grid < 0 ? -grid : 0, grid < 0 ? 0 : grid);
  for (int per_sm : {1, 2}) {
    barriers<false>(per_sm);
    barriers<true>(per_sm);
    for (int threads : {kThreads, kThreads + 32}) {
      persistent<0, false>(per_sm, threads), persistent<0, true>(per_sm, threads);
      persistent<1, false>(per_sm, threads), persistent<1, true>(per_sm, threads);
      persistent<2, false>(per_sm, threads), persistent<2, true>(per_sm, threads);
      persistent<4, false>(per_sm, threads), persistent<4, true>(per_sm, threads);
    }
  }
  stream_rows<false>("weights of a token, again", kUsed, 1, 1.0 / kTokens, "token", used);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc > 1 && !strcmp(argv[1], "--quick")) repeats = 5;
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);                     // nothing is loaded inside a capture
  measure();
  return failures > 0;
} catch (const std::exception& error) {
  fprintf(stderr, "launches: %s\n", error.what());
  return 1;
}
