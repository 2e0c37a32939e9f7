// Writes new keys and values into the pages of a cache, on the GPU.
//
//   k_pages[block_table[b, p / page], p % page] = k[b, t],  p = positions[b, t];  likewise v;  p = -1 writes nothing
//
// A block copies the keys and values of one token, all heads, in 16-byte vectors where every row allows it.
#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 128;

// Unit: what is copied at once, an element or 16 bytes of them; D and strides count units.
template <class Unit>
__global__ void __launch_bounds__(kThreads) _cache_append_kernel(CacheAppend op) {
  const int64_t b = blockIdx.x / op.T, t = blockIdx.x % op.T, position = op.positions[b * op.stride_pb + t];
  if (position < 0) return;
  const int64_t page = op.block_table[b * op.stride_tb + position / op.page], row = position % op.page;
  const Unit* k = static_cast<const Unit*>(op.k) + b * op.stride_kb + t * op.stride_kt;
  const Unit* v = static_cast<const Unit*>(op.v) + b * op.stride_vb + t * op.stride_vt;
  Unit* to_k = static_cast<Unit*>(op.k_pages) + page * op.stride_kpp + row * op.stride_kps;
  Unit* to_v = static_cast<Unit*>(op.v_pages) + page * op.stride_vpp + row * op.stride_vps;
  for (int64_t i = threadIdx.x; i < op.H * op.D; i += kThreads) {
    const int64_t h = i / op.D, d = i % op.D;
    to_k[h * op.stride_kph + d] = k[h * op.stride_kh + d];
    to_v[h * op.stride_vph + d] = v[h * op.stride_vh + d];
  }
}

template <class Unit>
void launch(const CacheAppend& op, cudaStream_t stream) {
  FASTLM_LAUNCH(_cache_append_kernel<Unit>, dim3(op.B * op.T), dim3(kThreads), stream, op);
}

// The op with sizes and strides in units of `elements`, or false where something is no whole number of them.
bool in_units(CacheAppend& op, int64_t elements) {
  for (const void* p : {static_cast<const void*>(op.k_pages), static_cast<const void*>(op.v_pages), op.k, op.v})
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  int64_t* const steps[] = {&op.D, &op.stride_kpp, &op.stride_kps, &op.stride_kph, &op.stride_vpp, &op.stride_vps,
                            &op.stride_vph, &op.stride_kb, &op.stride_kt, &op.stride_kh, &op.stride_vb,
                            &op.stride_vt, &op.stride_vh};
  for (const int64_t* step : steps)
    if (*step % elements) return false;
  for (int64_t* step : steps) *step /= elements;
  return true;
}

}  // namespace

void cache_append_(const CacheAppend& op, cudaStream_t stream) {
  if (op.B * op.T * op.H * op.D == 0) return;
  const int size = op.dtype == DType::f32 ? 4 : 2;
  CacheAppend wide = op;
  if (in_units(wide, 16 / size)) launch<Vector<uint32_t>>(wide, stream);
  else if (size == 4) launch<uint32_t>(op, stream);
  else launch<uint16_t>(op, stream);
  check_launch("cache_append_");
}

}  // namespace fastlm::cuda
