// The ops as Python sees them: their fields by name, and a call that takes all of a struct as bytes.
//
//   m.ops["softmax_xent_fwd"].fields      ("loss", "lse", "x", …)
//   m.ops["softmax_xent_fwd"].format      "PPPqPqqqi", as Python's struct module reads it
//   m.ops["softmax_xent_fwd"](bytes, …)   runs it, without the GIL
//
// csrc/declared.py lists the members of the structs of fastlm.h.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

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

// A struct that was packed in Python.
class Packed {
 public:
  template <class Queue>
  Packed(const Bound<Queue>& op, const py::bytes& fields) {
    const std::string_view given = fields;
    const Field& last = op.fields[op.count - 1];
    if (given.size() != last.offset + last.size) {
      throw std::invalid_argument(std::string(op.name) + ": its fields come in " + std::to_string(given.size()) +
                                  " bytes, wanted " + std::to_string(last.offset + last.size));
    }
    std::memcpy(op_, given.data(), given.size());
  }
  const void* get() const { return op_; }

 private:
  alignas(std::max_align_t) char op_[kLargest] = {};
};

// Gives `m` its ops; `define` says how they are called.
template <class Queue, size_t kCount, class Define>
void bind(py::module_& m, const Bound<Queue> (&ops)[kCount], Define define) {
  py::class_<Bound<Queue>> type(m, "Op", py::module_local());
  type.def_property_readonly("fields", &Bound<Queue>::names).def_property_readonly("format", &Bound<Queue>::format);
  define(type);
  py::dict named;
  for (const Bound<Queue>& op : ops) named[op.name] = py::cast(op);
  m.attr("ops") = named;
#define FASTLM_CONSTANT(name) m.attr(#name) = name;
  FASTLM_CONSTANTS(FASTLM_CONSTANT)
#undef FASTLM_CONSTANT
}

// m.ops[name](fields, *, device, stream); Guard makes `device` current while the op is launched.
#define FASTLM_CUDA_OP(op, Op) FASTLM_BOUND(cuda, cudaStream_t, op, Op),
template <class Guard, size_t kCount>
void bind_cuda(py::module_& m, const Bound<cudaStream_t> (&ops)[kCount]) {
  bind(m, ops, [](auto& type) {
    type.def("__call__", [](const Bound<cudaStream_t>& op, const py::bytes& fields, int device, uintptr_t stream) {
      const Packed packed(op, fields);
      py::gil_scoped_release release;
      Guard guard(device);
      op.run(packed.get(), reinterpret_cast<cudaStream_t>(stream));
    }, py::arg("fields"), py::kw_only(), py::arg("device"), py::arg("stream"));
  });
}

}  // namespace fastlm
