// Binds an op that takes one struct of pointers, sizes and strides as a Python function of keyword arguments.
//
//   bind_cpu(m, "softmax_xent_fwd", cpu::softmax_xent_fwd);      fields_of<SoftmaxXentFwd>() is in fields.h
//
// Every field must be given and no other; pointers come as integers (data_ptr()). The GIL is released while the
// op runs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fastlm.h"

namespace fastlm {

namespace py = pybind11;

template <class Op>
struct Field {
  const char* name;
  void (*set)(Op&, const py::handle&);
};

template <class Member>
Member from_python(const py::handle& value) {
  if constexpr (std::is_pointer_v<Member>) {
    return reinterpret_cast<Member>(value.cast<uintptr_t>());
  } else if constexpr (std::is_enum_v<Member>) {
    return static_cast<Member>(value.cast<int>());
  } else {
    return value.cast<Member>();
  }
}

// The arguments of an Op, in the order of its struct.
template <class Op>
std::vector<Field<Op>> fields_of();

// Fills an Op from keyword arguments, taking each away; TypeError for one that is missing or left over.
template <class Op>
Op take_fields(const char* name, const std::vector<Field<Op>>& fields, py::kwargs& kwargs) {
  Op op{};
  for (const Field<Op>& field : fields) {
    PyObject* value = PyDict_GetItemString(kwargs.ptr(), field.name);
    if (!value) throw py::type_error(std::string(name) + ": missing argument " + field.name);
    field.set(op, value);
  }
  if (kwargs.size() != fields.size()) {
    throw py::type_error(std::string(name) + ": got " + std::to_string(kwargs.size()) + " fields, wanted " +
                         std::to_string(fields.size()));
  }
  return op;
}

// m.<name>(*, threads, **fields)
template <class Op>
void bind_cpu(py::module_& m, const char* name, void (*run)(const Op&, int)) {
  m.def(
      name,
      [name, run, fields = fields_of<Op>()](int threads, py::kwargs kwargs) {
        Op op = take_fields<Op>(name, fields, kwargs);
        py::gil_scoped_release release;
        run(op, threads);
      },
      py::kw_only(), py::arg("threads"));
}

// A call with its arguments, to be made again and again.
class Prepared {
 public:
  explicit Prepared(std::function<void()> run) : run_(std::move(run)) {}
  void operator()() const {
    py::gil_scoped_release release;
    run_();
  }

 private:
  std::function<void()> run_;
};

// m.<name>(*, threads, **fields) gives a Prepared
template <class Op>
void bind_cpu_prepared(py::module_& m, const char* name, void (*run)(const Op&, int)) {
  m.def(
      name,
      [name, run, fields = fields_of<Op>()](int threads, py::kwargs kwargs) {
        return Prepared([run, threads, op = take_fields<Op>(name, fields, kwargs)] { run(op, threads); });
      },
      py::kw_only(), py::arg("threads"));
}

// m.<name>(*, device, stream, **fields); Guard makes `device` current while the op is launched.
template <class Guard, class Op>
void bind_cuda(py::module_& m, const char* name, void (*run)(const Op&, cudaStream_t)) {
  m.def(
      name,
      [name, run, fields = fields_of<Op>()](int device, uintptr_t stream, py::kwargs kwargs) {
        Op op = take_fields<Op>(name, fields, kwargs);
        py::gil_scoped_release release;
        Guard guard(device);
        run(op, reinterpret_cast<cudaStream_t>(stream));
      },
      py::kw_only(), py::arg("device"), py::arg("stream"));
}

}  // namespace fastlm
