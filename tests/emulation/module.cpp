// The CUDA kernels on the CPU as a Python module whose `cuda` takes what fastlm._C.cuda takes.
#define EMU_IMPLEMENTATION
#include "cuda_on_cpu.h"

#include "fields.h"

namespace fastlm {

struct NoDevice {
  explicit NoDevice(int) {}
};

PYBIND11_MODULE(EMU_MODULE, m) {
  py::module_ on_cuda = m.def_submodule("cuda");
  bind_cuda<NoDevice>(on_cuda, "softmax_xent_fwd", cuda::softmax_xent_fwd);
  bind_cuda<NoDevice>(on_cuda, "softmax_xent_bwd", cuda::softmax_xent_bwd);
  bind_cuda<NoDevice>(on_cuda, "softmax_xent_", cuda::softmax_xent_);
  bind_cuda<NoDevice>(on_cuda, "attention_fwd", cuda::attention_fwd);
  bind_cuda<NoDevice>(on_cuda, "decode_attention", cuda::decode_attention);
  bind_cuda<NoDevice>(on_cuda, "cache_append_", cuda::cache_append_);
}

}  // namespace fastlm
