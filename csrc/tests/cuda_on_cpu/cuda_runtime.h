// In the place of CUDA's header, for tests on machines without a GPU: a C++ compiler makes kernels of csrc/cuda run on a
// CPU (block.h).
#pragma once

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

#define CUDART_VERSION 13000

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInsufficientDriver,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidConfiguration
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned of_x = 1) : x(of_x), y(1), z(1) {}
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error that a test wanted"; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 12080, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 7, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024 ||
      config->blockDim.x % cuda_on_cpu::Block::WARP != 0)
    return cudaErrorInvalidConfiguration;
  cuda_on_cpu::Block::get().run({config->gridDim.x, 1, 1}, config->blockDim.x, [&] { kernel(arguments...); });
  return cudaSuccess;
}
