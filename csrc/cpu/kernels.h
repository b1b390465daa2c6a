// The kernels, compiled once for each instruction set: what module.cpp chooses from.
#pragma once

#include "activation.h"
#include "attention.h"
#include "cross_entropy.h"
#include "inner_sgd.h"
#include "norm.h"
#include "rotary.h"

// Each kernel of an op on rows, and its arguments.
#define GRADMEM_EACH_ROW_KERNEL(F)                \
  F(norm_forward, NormForward)                    \
  F(norm_backward, NormBackward)                  \
  F(activation_forward, ActivationForward)        \
  F(activation_backward, ActivationBackward)      \
  F(rotary, Rotary)                               \
  F(inner_sgd_forward, InnerSGDForward)           \
  F(inner_sgd_backward, InnerSGDBackward)         \
  F(cross_entropy_forward, CrossEntropyForward)   \
  F(cross_entropy_backward, CrossEntropyBackward)
#define GRADMEM_EACH_ATTENTION_KERNEL(F) \
  F(attention_forward, AttentionForward) \
  F(attention_backward, AttentionBackward)
#define GRADMEM_EACH_KERNEL(F) GRADMEM_EACH_ROW_KERNEL(F) GRADMEM_EACH_ATTENTION_KERNEL(F)

namespace gradmem {
#define GRADMEM_DECLARE(kernel, Arguments) void kernel(const Arguments&);
namespace baseline {
GRADMEM_EACH_KERNEL(GRADMEM_DECLARE)
}
namespace avx2 {
GRADMEM_EACH_KERNEL(GRADMEM_DECLARE)
}
namespace avx512 {
GRADMEM_EACH_KERNEL(GRADMEM_DECLARE)
}
#undef GRADMEM_DECLARE
}  // namespace gradmem
