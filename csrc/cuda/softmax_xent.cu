// Softmax cross-entropy on the GPU.
//
//   lse[n]   = log sum_v exp(x[n, v])
//   loss[n]  = lse[n] - x[n, y[n]]                              0 where y[n] == ignore
//   dx[n, v] = (exp(x[n, v] - lse[n]) - [v == y[n]]) dloss[n]
//
// A block owns a row. Forward reads it once, in 16-byte vectors where the row allows (its first elements up to a
// boundary and its last ones singly); every thread keeps a running maximum and sum, merged over lanes, then over
// warps, in a fixed order. Backward reads x once and writes dx once, but the label's element twice. In place both are
// one kernel, which keeps the row in shared memory (101 KB at V = 50257, bf16: two blocks a multiprocessor, so that one
// reads while the other writes): one read and one write in all. A row that does not fit is read a second time.
// Source of the online softmax: Milakov and Gimelshein, arXiv 1805.02867.
#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kAhead = 4;  // vectors that a thread has on the way before it uses one

template <class T>
__device__ void take(OnlineSoftmax& state, const T* x, int count) {
  float top = state.m;
  for (int i = 0; i < count; i++) top = fmaxf(top, to_float(x[i]));
  const float from = OnlineSoftmax::origin(top);
  float s = state.s * OnlineSoftmax::exp(state.m - from);
  for (int i = 0; i < count; i++) s += OnlineSoftmax::exp(to_float(x[i]) - from);
  state = {top, s};
}

// The state of `lanes` neighbouring lanes, in each of them.
__device__ OnlineSoftmax merge_lanes(OnlineSoftmax state, int lanes) {
  float top = state.m;
  for (int offset = lanes / 2; offset; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
  float s = state.s * OnlineSoftmax::exp(state.m - OnlineSoftmax::origin(top));
  for (int offset = lanes / 2; offset; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
  return {top, s};
}

// The state of the whole block, in every thread.
__device__ OnlineSoftmax merge_block(OnlineSoftmax state) {
  FASTLM_SHARED(OnlineSoftmax, of_warp, kWarps);
  state = merge_lanes(state, 32);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = state;
  __syncthreads();
  return merge_lanes(of_warp[threadIdx.x % kWarps], kWarps);
}

// use(i, load(i)) for the vectors of this thread.
template <class Load, class Use>
__device__ void for_vectors(int64_t vectors, Load load, Use use) {
  int64_t i = threadIdx.x;
  for (int64_t last = i + (kAhead - 1) * kThreads; last < vectors; last += kAhead * kThreads) {
    decltype(load(i)) loaded[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; k++) loaded[k] = load(i + k * kThreads);
#pragma unroll
    for (int k = 0; k < kAhead; k++) use(i + k * kThreads, loaded[k]);
    i = last + kThreads;
  }
  for (; i < vectors; i += kThreads) use(i, load(i));
}

template <class T>
__global__ void __launch_bounds__(kThreads) _softmax_xent_fwd_kernel(SoftmaxXentFwd op) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t n = blockIdx.x, V = op.V;
  const T* x = static_cast<const T*>(op.x) + n * op.stride_xn;                     // (V,)
  const int64_t head = min(elements_to_boundary(x), V), vectors = (V - head) / kSize;
  const Vector<T>* body = reinterpret_cast<const Vector<T>*>(x + head);            // (vectors,)

  OnlineSoftmax state = {-INFINITY, 0.0f};
  for_vectors(vectors, [&](int64_t i) { return body[i]; },
              [&](int64_t, const Vector<T>& loaded) { take(state, loaded.at, kSize); });
  for (int64_t v = threadIdx.x; v < head; v += kThreads) take(state, x + v, 1);
  for (int64_t v = head + vectors * kSize + threadIdx.x; v < V; v += kThreads) take(state, x + v, 1);
  state = merge_block(state);

  if (threadIdx.x == 0) {
    const int64_t y = op.y[n];
    op.lse[n] = state.m + state.log_sum();
    // Not lse - x[y]: where logits are large, lse has been rounded to their size.
    op.loss[n] = y == op.ignore ? 0.0f : y < 0 || y >= V ? NAN : state.log_sum() - (to_float(x[y]) - state.m);
  }
}

// dx without the label's -1: exp(x - origin) scale.
template <class T>
__device__ T gradient(T x, float origin, float scale) {
  return from_float<T>(OnlineSoftmax::exp(to_float(x) - origin) * scale);
}

template <class T>
__device__ Vector<T> gradient(Vector<T> x, float origin, float scale) {
  for (int j = 0; j < Vector<T>::kSize; j += 2)
    store_pair(x.at + j, OnlineSoftmax::exp(to_float(x.at[j]) - origin) * scale,
               OnlineSoftmax::exp(to_float(x.at[j + 1]) - origin) * scale);
  return x;
}

template <class T>
__global__ void __launch_bounds__(kThreads) _softmax_xent_bwd_kernel(SoftmaxXentBwd op) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t n = blockIdx.x, V = op.V, y = op.y[n];
  const T* x = static_cast<const T*>(op.x) + n * op.stride_xn;                     // (V,)
  T* dx = static_cast<T*>(op.dx) + n * op.stride_dxn;                              // (V,)
  if (y == op.ignore || y < 0 || y >= V) {
    const T fill = from_float<T>(y == op.ignore ? 0.0f : NAN);
    for (int64_t v = threadIdx.x; v < V; v += kThreads) dx[v] = fill;
    return;
  }
  const float dloss = op.dloss[n], lse = op.lse[n];
  const bool alike = reinterpret_cast<uintptr_t>(x) % 16 == reinterpret_cast<uintptr_t>(dx) % 16;
  const int64_t head = alike ? min(elements_to_boundary(x), V) : V, vectors = (V - head) / kSize;
  const int64_t tail = head + vectors * kSize;
  const Vector<T>* body = reinterpret_cast<const Vector<T>*>(x + head);            // (vectors,)
  Vector<T>* out = reinterpret_cast<Vector<T>*>(dx + head);                        // (vectors,)
  // The thread that writes dx[y] corrects it at the end. dx may be x: it has read x[y] before, no other writes there.
  const bool mine = (y < head ? y : y < tail ? (y - head) / kSize : y - tail) % kThreads == threadIdx.x;
  const float x_label = mine ? to_float(x[y]) : 0.0f;

  for_vectors(vectors, [&](int64_t i) { return body[i]; },
              [&](int64_t i, const Vector<T>& loaded) { out[i] = gradient(loaded, lse, dloss); });
  for (int64_t v = threadIdx.x; v < head; v += kThreads) dx[v] = gradient(x[v], lse, dloss);
  for (int64_t v = tail + threadIdx.x; v < V; v += kThreads) dx[v] = gradient(x[v], lse, dloss);
  if (mine) dx[y] = from_float<T>((OnlineSoftmax::exp(x_label - lse) - 1.0f) * dloss);
}

// A thread writes nothing but what it has read itself. `kStaged`: into shared memory, from where it takes it again.
template <class T, bool kStaged>
__global__ void __launch_bounds__(kThreads, 2) _softmax_xent_both_kernel(SoftmaxXentBoth op) {
  constexpr int kSize = Vector<T>::kSize;
  FASTLM_DYNAMIC_SHARED(Vector<T>, stage);                                         // (vectors,)
  const int64_t n = blockIdx.x, V = op.V, y = op.y[n];
  const float dloss = op.dloss[n];
  T* x = static_cast<T*>(op.x) + n * op.stride_xn;                                 // (V,)
  // Also where V < head < kSize: no vectors.
  const int64_t head = elements_to_boundary(x), vectors = (V - head) / kSize;
  Vector<T>* body = reinterpret_cast<Vector<T>*>(x + head);                        // (vectors,)
  // The one element outside the vectors that this thread owns, if there is one.
  const int64_t edge = threadIdx.x + (threadIdx.x < head ? 0 : vectors * kSize);
  const bool at_edge = edge < V;
  const float x_edge = at_edge ? to_float(x[edge]) : -INFINITY;

  OnlineSoftmax state = {-INFINITY, 0.0f};
  for_vectors(vectors, [&](int64_t i) { return body[i]; },
              [&](int64_t i, const Vector<T>& loaded) {
                if constexpr (kStaged) stage[i] = loaded;
                take(state, loaded.at, kSize);
              });
  state.merge({x_edge, 1.0f});
  const bool valid = !(y < 0 || y >= V), in_body = y >= head && y < head + vectors * kSize;
  const bool mine = valid && (in_body ? (y - head) / kSize % kThreads == threadIdx.x : y == edge);
  const float x_label = mine ? to_float(x[y]) : 0.0f;  // before this thread overwrites it, and no other does
  state = merge_block(state);

  if (threadIdx.x == 0) op.lse[n] = state.m + state.log_sum();
  if (y == op.ignore || !valid) {
    const float fill = y == op.ignore ? 0.0f : NAN;
    Vector<T> values;
    for (int j = 0; j < kSize; j++) values.at[j] = from_float<T>(fill);
    for (int64_t i = threadIdx.x; i < vectors; i += kThreads) body[i] = values;
    if (at_edge) x[edge] = from_float<T>(fill);
    if (threadIdx.x == 0) op.loss[n] = fill;
    return;
  }
  // p is exp(x - m) / s, not exp(x - lse): where logits are large, lse has been rounded to their size.
  const float origin = OnlineSoftmax::origin(state.m), scale = dloss / state.s;
  for_vectors(vectors, [&](int64_t i) { return kStaged ? stage[i] : body[i]; },
              [&](int64_t i, const Vector<T>& loaded) { body[i] = gradient(loaded, origin, scale); });
  if (at_edge) x[edge] = from_float<T>(OnlineSoftmax::exp(x_edge - origin) * scale);
  if (mine) {
    const float p = OnlineSoftmax::exp(x_label - origin) / state.s;
    x[y] = from_float<T>((p - 1.0f) * dloss);
    op.loss[n] = state.log_sum() - (x_label - state.m);
  }
}

template <class T>
void fwd(const SoftmaxXentFwd& op, cudaStream_t stream) {
  FASTLM_LAUNCH(_softmax_xent_fwd_kernel<T>, dim3(op.N), dim3(kThreads), stream, op);
}

template <class T>
void bwd(const SoftmaxXentBwd& op, cudaStream_t stream) {
  FASTLM_LAUNCH(_softmax_xent_bwd_kernel<T>, dim3(op.N), dim3(kThreads), stream, op);
}

template <class T>
void both(const SoftmaxXentBoth& op, cudaStream_t stream) {
  const int64_t bytes = op.V * int64_t(sizeof(T)) / 16 * 16;
  if (bytes <= shared_limit())
    FASTLM_LAUNCH_SHARED((_softmax_xent_both_kernel<T, true>), dim3(op.N), dim3(kThreads), int(bytes), stream, op);
  else
    FASTLM_LAUNCH((_softmax_xent_both_kernel<T, false>), dim3(op.N), dim3(kThreads), stream, op);
}

}  // namespace

void softmax_xent_fwd(const SoftmaxXentFwd& op, cudaStream_t stream) {
  if (op.N == 0) return;
  switch (op.dtype) {
    case DType::f32: fwd<float>(op, stream); break;
    case DType::bf16: fwd<__nv_bfloat16>(op, stream); break;
    case DType::f16: fwd<__half>(op, stream); break;
  }
  check_launch("softmax_xent_fwd");
}

void softmax_xent_bwd(const SoftmaxXentBwd& op, cudaStream_t stream) {
  if (op.N == 0 || op.V == 0) return;
  switch (op.dtype) {
    case DType::f32: bwd<float>(op, stream); break;
    case DType::bf16: bwd<__nv_bfloat16>(op, stream); break;
    case DType::f16: bwd<__half>(op, stream); break;
  }
  check_launch("softmax_xent_bwd");
}

void softmax_xent_(const SoftmaxXentBoth& op, cudaStream_t stream) {
  if (op.N == 0) return;
  switch (op.dtype) {
    case DType::f32: both<float>(op, stream); break;
    case DType::bf16: both<__nv_bfloat16>(op, stream); break;
    case DType::f16: both<__half>(op, stream); break;
  }
  check_launch("softmax_xent_");
}

}  // namespace fastlm::cuda
