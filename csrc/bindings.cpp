// The Python module fastlm._C: submodules cpu and, where it was built with nvcc, cuda.
#include "cpu/heap.h"
#include "fields.h"

#ifdef FASTLM_HAVE_CUDA
#include <cuda_runtime.h>
#endif

namespace fastlm {
namespace {

#ifdef FASTLM_HAVE_CUDA
// Makes a device current and restores the former one; stream 0 alone does not name a GPU.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&former_));
    if (device != former_) check(cudaSetDevice(device));
    device_ = device;
  }
  ~DeviceGuard() {
    if (device_ != former_) cudaSetDevice(former_);
  }

 private:
  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA device: ") + cudaGetErrorString(error));
  }
  int former_ = 0, device_ = 0;
};
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastlm's native kernels; fastlm.backends.native alone calls them";

  py::module_ on_cpu = m.def_submodule("cpu");
  on_cpu.def("isa", cpu::isa);
  on_cpu.def("isas", cpu::isas);
  on_cpu.def("widest_isa", cpu::widest_isa);
  on_cpu.def("keep_heap", cpu::keep_heap, py::kw_only(), py::arg("large"));
  bind_cpu(on_cpu, "softmax_xent_fwd", cpu::softmax_xent_fwd);
  bind_cpu(on_cpu, "softmax_xent_bwd", cpu::softmax_xent_bwd);
  bind_cpu(on_cpu, "softmax_xent_", cpu::softmax_xent_);
  bind_cpu(on_cpu, "gpt2_blocks_fwd", cpu::gpt2_blocks_fwd);
  bind_cpu(on_cpu, "gpt2_blocks_bwd", cpu::gpt2_blocks_bwd);
  bind_cpu(on_cpu, "bias_gelu_fwd", cpu::bias_gelu_fwd);
  bind_cpu(on_cpu, "bias_gelu_bwd", cpu::bias_gelu_bwd);
  bind_cpu(on_cpu, "layer_norm_fwd", cpu::layer_norm_fwd);
  bind_cpu(on_cpu, "layer_norm_bwd", cpu::layer_norm_bwd);
  bind_cpu(on_cpu, "adamw_", cpu::adamw_);
  bind_cpu(on_cpu, "grad_norm", cpu::grad_norm);
  bind_cpu(on_cpu, "attention_fwd", cpu::attention_fwd);
  bind_cpu(on_cpu, "attention_bwd", cpu::attention_bwd);
  bind_cpu(on_cpu, "decode_attention", cpu::decode_attention);
  bind_cpu(on_cpu, "cache_append_", cpu::cache_append_);
  py::class_<Prepared>(on_cpu, "Prepared").def("__call__", &Prepared::operator());
  bind_cpu_prepared(on_cpu, "gpt2_step", cpu::gpt2_step);
  bind_cpu(on_cpu, "draw", cpu::draw);

#ifdef FASTLM_HAVE_CUDA
  py::module_ on_cuda = m.def_submodule("cuda");
  on_cuda.def("architectures", [] { return FASTLM_CUDA_ARCHITECTURES; });
  bind_cuda<DeviceGuard>(on_cuda, "softmax_xent_fwd", cuda::softmax_xent_fwd);
  bind_cuda<DeviceGuard>(on_cuda, "softmax_xent_bwd", cuda::softmax_xent_bwd);
  bind_cuda<DeviceGuard>(on_cuda, "softmax_xent_", cuda::softmax_xent_);
  bind_cuda<DeviceGuard>(on_cuda, "attention_fwd", cuda::attention_fwd);
  bind_cuda<DeviceGuard>(on_cuda, "decode_attention", cuda::decode_attention);
  bind_cuda<DeviceGuard>(on_cuda, "cache_append_", cuda::cache_append_);
#endif
}

}  // namespace fastlm
