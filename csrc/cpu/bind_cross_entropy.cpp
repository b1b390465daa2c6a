#include "bind.h"

namespace gradmem {
namespace {

void fill(const py::dict& arguments, CrossEntropy& c) {
  GRADMEM_READ(dtype) GRADMEM_READ(threads) GRADMEM_READ(rows) GRADMEM_READ(width) GRADMEM_READ(z) GRADMEM_READ(z_t)
  GRADMEM_READ(label) GRADMEM_READ(a) GRADMEM_READ(b) GRADMEM_READ(lse) GRADMEM_READ(mu)
}

void fill(const py::dict& arguments, CrossEntropyForward& c) {
  fill(arguments, static_cast<CrossEntropy&>(c));
  GRADMEM_READ(row) GRADMEM_READ(row_t) GRADMEM_READ(wanted)
}

void fill(const py::dict& arguments, CrossEntropyBackward& c) {
  fill(arguments, static_cast<CrossEntropy&>(c));
}

}  // namespace

void bind_cross_entropy(py::module_& module) {
  bind(module, "cross_entropy_forward", &Kernels::cross_entropy_forward, fill);
  bind(module, "cross_entropy_backward", &Kernels::cross_entropy_backward, fill);
}

}  // namespace gradmem
