// swiglu and gelu on CPUs: the arguments of their two kernels. Formulas: csrc/common/activation.h.
#pragma once

#include "../common/activation.h"
#include "tensor.h"

namespace gradmem {

// Tensors are [rows, width]: inputs at strides of their rows, results dense. Absent inputs are known zeros, but for up,
// which gelu does not have; absent results are not wanted.
struct Activation {
  Dtype dtype;
  int threads;
  Form form;
  Index rows, width;
  View<1> x, up, x_t, up_t;
};

struct ActivationForward : Activation {
  void *y, *y_t;
};

// a and b are the cotangents of y and y_t.
struct ActivationBackward : Activation {
  View<1> a, b;
  void *dx, *dx_t, *dup, *dup_t, *y_t;
};

}  // namespace gradmem
