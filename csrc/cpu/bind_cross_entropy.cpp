#include "bind.h"

namespace gradmem {
namespace {

void read_rows(const py::dict& arguments, CrossEntropy& c) {
  GRADMEM_READ(dtype) GRADMEM_READ(threads) GRADMEM_READ(rows) GRADMEM_READ(width) GRADMEM_READ(z) GRADMEM_READ(z_t)
  GRADMEM_READ(label) GRADMEM_READ(a) GRADMEM_READ(b) GRADMEM_READ(lse) GRADMEM_READ(mu)
}

}  // namespace

void bind_cross_entropy(py::module_& module) {
  module.def("cross_entropy_forward", [](const py::dict& arguments) {
    CrossEntropyForward c{};
    read_rows(arguments, c);
    GRADMEM_READ(row) GRADMEM_READ(row_t) GRADMEM_READ(wanted)
    py::gil_scoped_release release;
    kernels().cross_entropy_forward(c);
  });
  module.def("cross_entropy_backward", [](const py::dict& arguments) {
    CrossEntropyBackward c{};
    read_rows(arguments, c);
    py::gil_scoped_release release;
    kernels().cross_entropy_backward(c);
  });
}

}  // namespace gradmem
