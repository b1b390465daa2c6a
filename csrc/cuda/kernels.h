// The launches of CUDA kernels; each takes the arguments of its namesake on a CPU, addresses being the device's. Those of
// attention are for Hopper alone, where the module was compiled for sm_90a.
#pragma once

#include "../cpu/kernels.h"

namespace gradmem::cuda {
#define GRADMEM_DECLARE(kernel, Arguments) void kernel(const Arguments&);
GRADMEM_EACH_KERNEL(GRADMEM_DECLARE)
#undef GRADMEM_DECLARE
}  // namespace gradmem::cuda
