// Softmax cross-entropy on the GPU.
//
//   lse[n]   = log sum_v exp(x[n, v])
//   loss[n]  = lse[n] - x[n, y[n]]                              0 where y[n] == ignore
//   dx[n, v] = (exp(x[n, v] - lse[n]) - [v == y[n]]) dloss[n]
//
// A block owns a row. Forward reads it once, in 16-byte vectors where the row allows (its first elements up to a
// boundary and its last ones singly); every thread keeps a running maximum and sum, merged over lanes, then over
// warps, in a fixed order. Backward reads x once and writes dx once.
// Source of the online softmax: Milakov and Gimelshein, arXiv 1805.02867.
#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

template <class T>
__device__ void take(OnlineSoftmax& state, const T* x, int count) {
  float top = state.m;
  for (int i = 0; i < count; i++) top = fmaxf(top, to_float(x[i]));
  const float from = OnlineSoftmax::origin(top);
  float s = state.s * OnlineSoftmax::exp(state.m - from);
  for (int i = 0; i < count; i++) s += OnlineSoftmax::exp(to_float(x[i]) - from);
  state = {top, s};
}

// The state of the whole block, in every thread.
__device__ OnlineSoftmax merge_block(OnlineSoftmax state) {
  FASTLM_SHARED(OnlineSoftmax, of_warp, kWarps);
  for (int offset = 16; offset; offset /= 2)
    state.merge({__shfl_xor_sync(0xffffffffu, state.m, offset), __shfl_xor_sync(0xffffffffu, state.s, offset)});
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = state;
  __syncthreads();
  state = of_warp[0];
  for (int warp = 1; warp < kWarps; warp++) state.merge(of_warp[warp]);
  return state;
}

template <class T>
__global__ void __launch_bounds__(kThreads) _softmax_xent_fwd_kernel(SoftmaxXentFwd op) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t n = blockIdx.x, V = op.V;
  const T* x = static_cast<const T*>(op.x) + n * op.stride_xn;                     // (V,)
  const int64_t head = min(elements_to_boundary(x), V), vectors = (V - head) / kSize;
  const Vector<T>* body = reinterpret_cast<const Vector<T>*>(x + head);            // (vectors,)

  OnlineSoftmax state = {-INFINITY, 0.0f};
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    const Vector<T> loaded = body[i];
    take(state, loaded.at, kSize);
  }
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

// dx of one row: p scaled by dloss, without the label's -1.
template <class T>
__device__ T gradient(T x, float lse, float dloss) {
  return from_float<T>(OnlineSoftmax::exp(to_float(x) - lse) * dloss);
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
  // Only the thread that writes dx[y] uses this, and dx may be x: no other writes there before it has read.
  const float at_label = (OnlineSoftmax::exp(to_float(x[y]) - lse) - 1.0f) * dloss;

  const bool alike = reinterpret_cast<uintptr_t>(x) % 16 == reinterpret_cast<uintptr_t>(dx) % 16;
  const int64_t head = alike ? min(elements_to_boundary(x), V) : V, vectors = (V - head) / kSize;
  const Vector<T>* body = reinterpret_cast<const Vector<T>*>(x + head);            // (vectors,)
  Vector<T>* out = reinterpret_cast<Vector<T>*>(dx + head);                        // (vectors,)
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    Vector<T> values = body[i];
    for (int j = 0; j < kSize; j++) {
      const int64_t v = head + i * kSize + j;
      values.at[j] = v == y ? from_float<T>(at_label) : gradient(values.at[j], lse, dloss);
    }
    out[i] = values;
  }
  for (int64_t v = threadIdx.x; v < head; v += kThreads)
    dx[v] = v == y ? from_float<T>(at_label) : gradient(x[v], lse, dloss);
  for (int64_t v = head + vectors * kSize + threadIdx.x; v < V; v += kThreads)
    dx[v] = v == y ? from_float<T>(at_label) : gradient(x[v], lse, dloss);
}

template <class T>
void fwd(const SoftmaxXentFwd& op, cudaStream_t stream) {
  FASTLM_LAUNCH(_softmax_xent_fwd_kernel<T>, dim3(op.N), dim3(kThreads), stream, op);
}

template <class T>
void bwd(const SoftmaxXentBwd& op, cudaStream_t stream) {
  FASTLM_LAUNCH(_softmax_xent_bwd_kernel<T>, dim3(op.N), dim3(kThreads), stream, op);
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

}  // namespace fastlm::cuda
