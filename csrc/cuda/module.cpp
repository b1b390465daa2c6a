// The module gradmem_kernels.native._cuda: kernels that take the arguments of those on CPUs, read by the same bindings,
// and beside them "device", "stream" and, where they add up over programs, "workspace" and "parts".

#include <string>

#include "../cpu/bind.h"
#include "kernels.h"
#include "target.h"

namespace gradmem {

namespace cuda {

Target& target() {
  static thread_local Target on;
  return on;
}

void check(cudaError_t result, const char* call) {
  if (result == cudaSuccess) return;
  cudaGetLastError();  // it was seen
  std::string why = std::string(call) + ": " + cudaGetErrorString(result);
  int knows = 0, major = 0, minor = 0;
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  if (result == cudaErrorInsufficientDriver && cudaDriverGetVersion(&knows) == cudaSuccess)
    why += knows == 0 ? std::string("; there is no driver")
                      : "; the driver knows CUDA " + version(knows) + ", and these kernels were compiled by CUDA " +
                            version(CUDART_VERSION) + ": update the driver, or build with an older toolkit";
  const int device = target().device;
  if (result == cudaErrorNoKernelImageForDevice &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
    why += "; device " + std::to_string(device) + " has compute capability " + std::to_string(major) + "." +
           std::to_string(minor) + ", for which these kernels were not compiled (GRADMEM_CUDA_ARCHS)";
  throw std::runtime_error(why);
}

namespace {

// Makes a device the current one, and then again that which was.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    GRADMEM_CUDA(cudaGetDevice(&before_));
    if (device_ != before_) GRADMEM_CUDA(cudaSetDevice(device_));
  }
  // Never raises: an error of the call itself goes before.
  ~OnDevice() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int device_, before_ = 0;
};

// A kernel of the bindings, called where its arguments say.
py::cpp_function on_target(const py::object& kernel) {
  return [kernel](const py::dict& arguments) {
    Target on;
    std::uintptr_t stream, workspace;
    read(arguments, "device", on.device);
    read(arguments, "stream", stream);
    read(arguments, "workspace", workspace);
    read(arguments, "parts", on.parts);
    on.stream = reinterpret_cast<cudaStream_t>(stream);
    on.workspace = reinterpret_cast<void*>(workspace);
    target() = on;
    const OnDevice here(on.device);
    kernel(arguments);
  };
}

}  // namespace
}  // namespace cuda

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels cuda_kernels{};
    cuda_kernels.isa = "cuda";
    cuda_kernels.runs = true;
#define GRADMEM_ADDRESS(kernel, Arguments) cuda_kernels.kernel = cuda::kernel;
    GRADMEM_EACH_ROW_KERNEL(GRADMEM_ADDRESS)
#ifdef GRADMEM_WITH_HOPPER
    GRADMEM_EACH_ATTENTION_KERNEL(GRADMEM_ADDRESS)
#endif
#undef GRADMEM_ADDRESS
    return cuda_kernels;
  }();
  return table;
}

}  // namespace gradmem

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Kernels on CUDA devices, from csrc/cuda.";
  module.attr("toolkit") = CUDART_VERSION;
  pybind11::module_ bindings = module.def_submodule("bindings", "Without a device and a stream: not to be called.");
  gradmem::bind_rows(bindings);
  gradmem::bind_cross_entropy(bindings);
#define GRADMEM_BIND(kernel, Arguments) module.attr(#kernel) = gradmem::cuda::on_target(bindings.attr(#kernel));
  GRADMEM_EACH_ROW_KERNEL(GRADMEM_BIND)
#ifdef GRADMEM_WITH_HOPPER
  gradmem::bind_attention(bindings);
  GRADMEM_EACH_ATTENTION_KERNEL(GRADMEM_BIND)
#endif
#undef GRADMEM_BIND
}
