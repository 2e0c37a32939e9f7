// The ops as Python sees them: their fields by name, and a call that takes a dict of them.
//
//   m.ops["softmax_xent_fwd"].fields          ("loss", "lse", "x", …)
//   m.ops["softmax_xent_fwd"](given, …)       runs it, without the GIL
//   m.ops["softmax_xent_fwd"].packed(given)   the struct's bytes, and .format, as Python's struct module reads them
//   m.dtypes                                  {dtype: DType}, for Python to fill
//
// A tensor gives its address, and to the stride_… that are declared behind it its strides, unless those are given; None
// gives zeros; a dtype its number. csrc/declared.py lists the members of the structs of fastlm.h.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "declared.h"
#include "fastlm.h"

namespace fastlm {

namespace py = pybind11;

struct Field {
  const char* name;
  size_t offset, size;
  char code;
};

// How Python's struct module names a type.
template <class Member>
constexpr char code() {
  if constexpr (std::is_pointer_v<Member>) return 'P';
  else if constexpr (std::is_same_v<Member, int64_t>) return 'q';
  else if constexpr (std::is_same_v<Member, float>) return 'f';
  else if constexpr (std::is_same_v<Member, double>) return 'd';
  else {
    static_assert(std::is_enum_v<Member> || std::is_same_v<Member, int>, "a kind of field that Python cannot fill");
    return 'i';
  }
}

// Whether the fields lie as the struct module packs them.
constexpr bool packed_alike(const Field* fields, size_t count) {
  size_t end = 0;
  for (size_t i = 0; i < count; i++) {
    if (fields[i].offset != (end + fields[i].size - 1) / fields[i].size * fields[i].size) return false;
    end = fields[i].offset + fields[i].size;
  }
  return true;
}

// Whether an Op has as many members.
struct Anything {
  template <class Member>
  operator Member() const;
};

template <class Op, size_t... i>
constexpr bool takes(std::index_sequence<i...>) {
  return requires { Op{((void)i, Anything{})...}; };
}

template <class Op, size_t count>
constexpr bool has_members() {
  return takes<Op>(std::make_index_sequence<count>()) && !takes<Op>(std::make_index_sequence<count + 1>());
}

constexpr size_t kLargest = 1024;  // bytes of a struct

#define FASTLM_FIELD(Op, member) {#member, offsetof(Op, member), sizeof(Op::member), code<decltype(Op::member)>()},
#define FASTLM_TABLE(Op)                                                                                \
  inline constexpr Field kFieldsOf##Op[] = {FASTLM_FIELDS_OF_##Op(FASTLM_FIELD)};                       \
  static_assert(has_members<Op, std::size(kFieldsOf##Op)>(), #Op ": csrc/declared.py misses a member"); \
  static_assert(packed_alike(kFieldsOf##Op, std::size(kFieldsOf##Op)) && sizeof(Op) <= kLargest);
FASTLM_STRUCTS(FASTLM_TABLE)
#undef FASTLM_TABLE
#undef FASTLM_FIELD

// An op: its fields, and how it runs on a queue, the number of threads or a GPU's stream.
template <class Queue>
struct Bound {
  const char* name;
  const Field* fields;
  size_t count;
  void (*run)(const void*, Queue);

  std::string format() const {
    std::string codes;
    for (size_t i = 0; i < count; i++) codes += fields[i].code;
    return codes;
  }

  py::tuple names() const {
    py::tuple told(count);
    for (size_t i = 0; i < count; i++) told[i] = fields[i].name;
    return told;
  }
};

#define FASTLM_BOUND(space, Queue, op, Op)                                                          \
  Bound<Queue>{#op, kFieldsOf##Op, std::size(kFieldsOf##Op),                                        \
               [](const void* given, Queue queue) { space::op(*static_cast<const Op*>(given), queue); }}

// Python's objects that every call needs, made once and never given back.
struct Words {
  PyObject *data_ptr = PyUnicode_InternFromString("data_ptr"), *stride = PyUnicode_InternFromString("stride");
  PyObject* dtypes = PyDict_New();
};

inline const Words& words() {
  static const Words found;
  return found;
}

// An op's struct, filled from a dict of its fields.
class Packed {
 public:
  template <class Queue>
  Packed(const Bound<Queue>& op, const std::vector<PyObject*>& names, const py::dict& given) : name_(op.name) {
    py::object behind;  // the strides of the tensor before
    Py_ssize_t taken = 0, next = 0;
    for (size_t i = 0; i < op.count; i++) {
      const Field& field = op.fields[i];
      PyObject* value = PyDict_GetItemWithError(given.ptr(), names[i]);
      if (value != nullptr) {
        taken++;
        behind = py::object();
        if (field.code == 'P') behind = take_address(field, value, i + 1 < op.count && is_stride(op.fields[i + 1]));
        else take_number(field, value);
        next = 0;
      } else if (behind && is_stride(field)) {
        if (behind.is_none()) continue;  // of no tensor: zeros
        if (next == PyTuple_GET_SIZE(behind.ptr())) refuse(std::string("missing argument ") + field.name);
        take_number(field, PyTuple_GET_ITEM(behind.ptr(), next++));
      } else {
        refuse(std::string("missing argument ") + field.name);
      }
    }
    if (taken != PyDict_GET_SIZE(given.ptr())) refuse("no argument " + unknown(op, given));
  }
  const void* get() const { return op_; }

 private:
  static bool is_stride(const Field& field) { return std::string_view(field.name).starts_with("stride_"); }

  // The strides of a tensor, if they are wanted, None of none, and nothing where an address was given.
  py::object take_address(const Field& field, PyObject* value, bool wanted) {
    if (value == Py_None) return py::none();
    const bool number = PyLong_Check(value);
    const py::object address = number ? py::reinterpret_borrow<py::object>(value) : called(value, words().data_ptr);
    put(field, static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(address.ptr())));
    if (PyErr_Occurred()) refuse(field, value);
    return number || !wanted ? py::object() : called(value, words().stride);
  }

  void take_number(const Field& field, PyObject* value) {
    if (field.code == 'f') put(field, static_cast<float>(PyFloat_AsDouble(value)));
    else if (field.code == 'd') put(field, PyFloat_AsDouble(value));
    else if (field.code == 'q') put(field, static_cast<int64_t>(PyLong_AsLongLong(value)));
    else {
      PyObject* dtype = PyLong_Check(value) ? nullptr : PyDict_GetItemWithError(words().dtypes, value);
      const long long wide = PyErr_Occurred() ? 0 : PyLong_AsLongLong(dtype ? dtype : value);
      const int narrow = static_cast<int>(wide);
      put(field, narrow);
      if (narrow != wide) refuse(field, value);
    }
    if (PyErr_Occurred()) refuse(field, value);
  }

  template <class Value>
  void put(const Field& field, Value value) {
    std::memcpy(op_ + field.offset, &value, sizeof(Value));
  }

  static py::object called(PyObject* value, PyObject* method) {
    PyObject* found = PyObject_CallMethodNoArgs(value, method);
    if (found == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }

  [[noreturn]] void refuse(const Field& field, PyObject* value) const {
    PyErr_Clear();
    refuse(std::string(field.name) + "=" + std::string(py::repr(value)) + ", wanted a number that fits");
  }

  [[noreturn]] void refuse(const std::string& told) const { throw py::type_error(name_ + (": " + told)); }

  template <class Queue>
  static std::string unknown(const Bound<Queue>& op, const py::dict& given) {
    std::set<std::string> names;
    for (const auto& [name, value] : given) names.insert(py::cast<std::string>(name));
    for (size_t i = 0; i < op.count; i++) names.erase(op.fields[i].name);
    std::string told;
    for (const std::string& name : names) told += (told.empty() ? "" : ", ") + name;
    return told;
  }

  const char* name_;
  alignas(std::max_align_t) char op_[kLargest] = {};
};

// What Python holds of an op.
template <class Queue>
struct Op {
  const Bound<Queue>& bound;
  std::vector<PyObject*> names;  // interned

  explicit Op(const Bound<Queue>& op) : bound(op) {
    for (size_t i = 0; i < op.count; i++) names.push_back(PyUnicode_InternFromString(op.fields[i].name));
  }
  Packed packed(const py::dict& given) const { return Packed(bound, names, given); }
};

// Gives `m` its ops; `define` says how they are called.
template <class Queue, size_t kCount, class Define>
void bind(py::module_& m, const Bound<Queue> (&ops)[kCount], Define define) {
  py::class_<Op<Queue>> type(m, "Op", py::module_local());
  type.def_property_readonly("fields", [](const Op<Queue>& op) { return op.bound.names(); });
  type.def_property_readonly("format", [](const Op<Queue>& op) { return op.bound.format(); });
  type.def("packed", [](const Op<Queue>& op, const py::dict& given) {
    const Field& last = op.bound.fields[op.bound.count - 1];
    return py::bytes(static_cast<const char*>(op.packed(given).get()), last.offset + last.size);
  });
  define(type);
  py::dict named;
  for (const Bound<Queue>& op : ops) named[op.name] = py::cast(Op<Queue>(op));
  m.attr("ops") = named;
  m.attr("dtypes") = py::handle(words().dtypes);
#define FASTLM_CONSTANT(name) m.attr(#name) = name;
  FASTLM_CONSTANTS(FASTLM_CONSTANT)
#undef FASTLM_CONSTANT
}

// m.ops[name](given, *, device, stream); Guard makes `device` current while the op is launched.
#define FASTLM_CUDA_OP(op, Op) FASTLM_BOUND(cuda, cudaStream_t, op, Op),
template <class Guard, size_t kCount>
void bind_cuda(py::module_& m, const Bound<cudaStream_t> (&ops)[kCount]) {
  bind(m, ops, [](auto& type) {
    type.def("__call__", [](const Op<cudaStream_t>& op, const py::dict& given, int device, uintptr_t stream) {
      const Packed packed = op.packed(given);
      py::gil_scoped_release release;
      Guard guard(device);
      op.bound.run(packed.get(), reinterpret_cast<cudaStream_t>(stream));
    }, py::arg("given"), py::kw_only(), py::arg("device"), py::arg("stream"));
  });
}

}  // namespace fastlm
