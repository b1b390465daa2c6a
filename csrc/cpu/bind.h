// What the module's bindings share. Python passes a kernel's arguments by name in one dictionary, checked there.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace pybind11::detail {

// A view from (address, *strides), or None.
template <int N>
struct type_caster<gradmem::View<N>> {
  PYBIND11_TYPE_CASTER(gradmem::View<N>, const_name("tuple | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!isinstance<tuple>(source)) return false;
    const auto values = reinterpret_borrow<tuple>(source);
    if (values.size() < N + 1) return false;
    value.data = reinterpret_cast<void*>(values[0].cast<std::uintptr_t>());
    for (int i = 0; i < N; ++i) value.strides[i] = values[i + 1].cast<gradmem::Index>();
    return true;
  }
};

template <class E>
struct code_caster {
  PYBIND11_TYPE_CASTER(E, const_name("int"));

  bool load(handle source, bool) {
    value = E(source.cast<int>());
    return true;
  }
};

template <>
struct type_caster<gradmem::Dtype> : code_caster<gradmem::Dtype> {};
template <>
struct type_caster<gradmem::Form> : code_caster<gradmem::Form> {};

}  // namespace pybind11::detail

namespace gradmem {

namespace py = pybind11;

// The kernels of one instruction set.
struct Kernels {
  const char* isa;
  bool runs;  // whether this machine has it
#define GRADMEM_FIELD(kernel, Arguments) void (*kernel)(const Arguments&);
  GRADMEM_EACH_KERNEL(GRADMEM_FIELD)
#undef GRADMEM_FIELD
};

// Those that were chosen.
const Kernels& kernels();

// The argument of this name, or an exception that names it.
template <class T>
void read(const py::dict& arguments, const char* name, T& value) {
  if (!arguments.contains(name)) throw py::key_error(name);
  try {
    value = arguments[name].cast<T>();
  } catch (const py::cast_error&) {
    throw py::type_error(std::string(name) + ": " + std::string(py::repr(arguments[name])));
  }
}

// An address, 0 for what is absent.
template <class T>
void read(const py::dict& arguments, const char* name, T*& value) {
  std::uintptr_t address;
  read(arguments, name, address);
  value = reinterpret_cast<T*>(address);
}

// first, last + 1
inline void read(const py::dict& arguments, const char* name, Index (&range)[2]) {
  std::pair<Index, Index> values;
  read(arguments, name, values);
  range[0] = values.first, range[1] = values.second;
}

// Reads fields of c, each by its own name.
#define GRADMEM_READ(field) read(arguments, #field, c.field);

// Makes a kernel a function of the module, by what fills its arguments.
template <class Arguments>
void bind(py::module_& module, const char* name, void (*Kernels::*kernel)(const Arguments&),
          void (*fill)(const py::dict&, Arguments&)) {
  module.def(name, [kernel, fill](const py::dict& arguments) {
    Arguments c{};
    fill(arguments, c);
    py::gil_scoped_release release;
    (kernels().*kernel)(c);
  });
}

void bind_attention(py::module_& module);
void bind_cross_entropy(py::module_& module);
void bind_rows(py::module_& module);

}  // namespace gradmem
