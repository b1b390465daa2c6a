// The launches of CUDA kernels; each takes the arguments of its namesake on a CPU, addresses being the device's.
#pragma once

#include "../cpu/activation.h"
#include "../cpu/attention.h"
#include "../cpu/cross_entropy.h"
#include "../cpu/inner_sgd.h"
#include "../cpu/norm.h"
#include "../cpu/rotary.h"

// Each kernel, and its arguments.
#define GRADMEM_EACH_CUDA_KERNEL(F)                \
  F(norm_forward, NormForward)                     \
  F(norm_backward, NormBackward)                   \
  F(activation_forward, ActivationForward)         \
  F(activation_backward, ActivationBackward)       \
  F(rotary, Rotary)                                \
  F(inner_sgd_forward, InnerSGDForward)            \
  F(inner_sgd_backward, InnerSGDBackward)          \
  F(cross_entropy_forward, CrossEntropyForward)    \
  F(cross_entropy_backward, CrossEntropyBackward)

// Those for Hopper alone, where the module was compiled for sm_90a.
#define GRADMEM_EACH_HOPPER_KERNEL(F)      \
  F(attention_forward, AttentionForward)   \
  F(attention_backward, AttentionBackward)

namespace gradmem::cuda {
#define GRADMEM_DECLARE(kernel, Arguments) void kernel(const Arguments&);
GRADMEM_EACH_CUDA_KERNEL(GRADMEM_DECLARE)
GRADMEM_EACH_HOPPER_KERNEL(GRADMEM_DECLARE)
#undef GRADMEM_DECLARE
}  // namespace gradmem::cuda
