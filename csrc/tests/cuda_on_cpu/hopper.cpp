// The attention kernels for Hopper on a CPU, as a module _cuda that has nothing else.

#include <stdexcept>

#include "../../cpu/bind.h"
#include "../../cuda/common.cuh"
#include "../../cuda/kernels.h"

namespace gradmem {
namespace cuda {

Target& target() {
  static Target on;
  return on;
}

void check(cudaError_t result, const char* call) {
  if (result != cudaSuccess) throw std::runtime_error(call);
}

}  // namespace cuda

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels hopper{};
    hopper.attention_forward = cuda::attention_forward;
    hopper.attention_backward = cuda::attention_backward;
    return hopper;
  }();
  return table;
}

}  // namespace gradmem

PYBIND11_MODULE(_cuda, module) {
  pybind11::module_ bindings = module.def_submodule("bindings");
  gradmem::bind_attention(bindings);
  for (const char* name : {"attention_forward", "attention_backward"})
    module.attr(name) = pybind11::cpp_function([kernel = pybind11::object(bindings.attr(name))](
                                                   const pybind11::dict& arguments) {
      std::uintptr_t workspace;
      gradmem::read(arguments, "workspace", workspace);
      gradmem::cuda::target().workspace = reinterpret_cast<void*>(workspace);
      kernel(arguments);
    });
}
