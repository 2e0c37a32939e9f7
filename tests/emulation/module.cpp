// The CUDA kernels on the CPU as a Python module whose `cuda` takes what fastlm._C.cuda takes.
#define EMU_IMPLEMENTATION
#include "cuda_on_cpu.h"

#include "bind.h"

namespace fastlm {

struct NoDevice {
  explicit NoDevice(int) {}
};

PYBIND11_MODULE(EMU_MODULE, m) {
  py::module_ on_cuda = m.def_submodule("cuda");
  static const Bound<cudaStream_t> ops[] = {FASTLM_CUDA_OPS(FASTLM_CUDA_OP)};
  bind_cuda<NoDevice>(on_cuda, ops);
}

}  // namespace fastlm
