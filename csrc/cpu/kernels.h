// The kernels, compiled once for each instruction set: what module.cpp chooses from.
#pragma once

#include "attention.h"

#define GRADMEM_KERNELS(isa)                        \
  namespace isa {                                   \
  void attention_forward(const AttentionForward&);  \
  void attention_backward(const AttentionBackward&); \
  }

namespace gradmem {
GRADMEM_KERNELS(baseline)
GRADMEM_KERNELS(avx2)
GRADMEM_KERNELS(avx512)
}  // namespace gradmem
