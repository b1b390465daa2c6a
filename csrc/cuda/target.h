// Where CUDA kernels run, and what may go wrong there.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <stdexcept>
#include <string>

#include "../cpu/tensor.h"

namespace gradmem {

// Codes of dtypes are those of csrc/cpu/tensor.h, and one more.
constexpr Dtype FLOAT16 = Dtype(3);

namespace cuda {

// Where a call runs, and memory for what its programs add up: Python allocates it, kernels do not. One for each thread
// of the host, set around a call (module.cpp).
struct Target {
  int device = 0;
  cudaStream_t stream = nullptr;
  void* workspace = nullptr;
  Index parts = 0;  // programs that have a row of the workspace
};
Target& target();

// Raises what a call of CUDA returned, by the call's name.
void check(cudaError_t result, const char* call);
#define GRADMEM_CUDA(call) ::gradmem::cuda::check(call, #call)

// Rows are counted by 32 bits in a thread, so that they must be shorter than 2^31 by more than a block's step.
constexpr Index WIDEST = INT_MAX - (1 << 16);
inline void check_width(const char* kernel, Index width) {
  if (width > WIDEST)
    throw std::invalid_argument(std::string(kernel) + ": width: expected at most " + std::to_string(WIDEST) +
                                " elements in a row, got " + std::to_string(width));
}

}  // namespace cuda
}  // namespace gradmem
