// The Python module fastlm._C: submodules cpu and, where it was built with nvcc, cuda.
#include "bind.h"
#include "cpu/heap.h"

#ifdef FASTLM_HAVE_CUDA
#include <cuda_runtime.h>
#endif

namespace fastlm {
namespace {

// A call with its arguments, to be made again and again.
struct Prepared {
  const Bound<int>& op;
  Packed packed;
  int threads;

  void operator()() const {
    py::gil_scoped_release release;
    op.run(packed.get(), threads);
  }
};

void bind_cpu(py::module_& m) {
#define FASTLM_CPU_OP(op, Op) FASTLM_BOUND(cpu, int, op, Op),
  static const Bound<int> ops[] = {FASTLM_CPU_OPS(FASTLM_CPU_OP)};
#undef FASTLM_CPU_OP
  py::class_<Prepared>(m, "Prepared", py::module_local()).def("__call__", &Prepared::operator());
  bind(m, ops, [](auto& type) {
    type.def("__call__", [](const Op<int>& op, const py::dict& given, int threads) {
      const Packed packed = op.packed(given);
      py::gil_scoped_release release;
      op.bound.run(packed.get(), threads);
    }, py::arg("given"), py::kw_only(), py::arg("threads"));
    type.def("prepared", [](const Op<int>& op, const py::dict& given, int threads) {
      return Prepared{op.bound, op.packed(given), threads};
    }, py::arg("given"), py::kw_only(), py::arg("threads"));
  });
  m.def("isa", cpu::isa);
  m.def("isas", cpu::isas);
  m.def("widest_isa", cpu::widest_isa);
  m.def("keep_heap", cpu::keep_heap, py::kw_only(), py::arg("large"));
}

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
  bind_cpu(on_cpu);
#ifdef FASTLM_HAVE_CUDA
  py::module_ on_cuda = m.def_submodule("cuda");
  static const Bound<cudaStream_t> ops[] = {FASTLM_CUDA_OPS(FASTLM_CUDA_OP)};
  bind_cuda<DeviceGuard>(on_cuda, ops);
  on_cuda.def("architectures", [] { return FASTLM_CUDA_ARCHITECTURES; });
#endif
}

}  // namespace fastlm
