// Bindings of norms, activations, rotary and inner_sgd.

#include "bind.h"

namespace gradmem {
namespace {

void fill(const py::dict& arguments, Norm& c) {
  GRADMEM_READ(dtype) GRADMEM_READ(threads) GRADMEM_READ(rows) GRADMEM_READ(width) GRADMEM_READ(inner)
}

void fill(const py::dict& arguments, Activation& c) {
  GRADMEM_READ(dtype) GRADMEM_READ(threads) GRADMEM_READ(form) GRADMEM_READ(rows) GRADMEM_READ(width) GRADMEM_READ(x)
  GRADMEM_READ(up) GRADMEM_READ(x_t) GRADMEM_READ(up_t)
}

void fill(const py::dict& arguments, InnerSGD& c) {
  GRADMEM_READ(dtype) GRADMEM_READ(threads) GRADMEM_READ(batch) GRADMEM_READ(width) GRADMEM_READ(lr)
  GRADMEM_READ(clamp) GRADMEM_READ(clip_value) GRADMEM_READ(clip_norm) GRADMEM_READ(grad) GRADMEM_READ(grad_t)
  GRADMEM_READ(rate) GRADMEM_READ(rate_t)
}

void fill(const py::dict& arguments, NormForward& c) {
  fill(arguments, static_cast<Norm&>(c));
  GRADMEM_READ(eps) GRADMEM_READ(x) GRADMEM_READ(x_t) GRADMEM_READ(r) GRADMEM_READ(r_t) GRADMEM_READ(w)
  GRADMEM_READ(w_t) GRADMEM_READ(c) GRADMEM_READ(c_t) GRADMEM_READ(y) GRADMEM_READ(y_t) GRADMEM_READ(s)
  GRADMEM_READ(s_t) GRADMEM_READ(rstd) GRADMEM_READ(mean)
}

void fill(const py::dict& arguments, NormBackward& c) {
  fill(arguments, static_cast<Norm&>(c));
  GRADMEM_READ(x) GRADMEM_READ(x_t) GRADMEM_READ(a) GRADMEM_READ(b) GRADMEM_READ(g) GRADMEM_READ(h) GRADMEM_READ(w)
  GRADMEM_READ(w_t) GRADMEM_READ(c_t) GRADMEM_READ(rstd) GRADMEM_READ(mean) GRADMEM_READ(dx) GRADMEM_READ(dx_t)
  GRADMEM_READ(y_t) GRADMEM_READ(dw) GRADMEM_READ(dw_t) GRADMEM_READ(dc) GRADMEM_READ(dc_t)
}

void fill(const py::dict& arguments, ActivationForward& c) {
  fill(arguments, static_cast<Activation&>(c));
  GRADMEM_READ(y) GRADMEM_READ(y_t)
}

void fill(const py::dict& arguments, ActivationBackward& c) {
  fill(arguments, static_cast<Activation&>(c));
  GRADMEM_READ(a) GRADMEM_READ(b) GRADMEM_READ(dx) GRADMEM_READ(dx_t) GRADMEM_READ(dup) GRADMEM_READ(dup_t)
  GRADMEM_READ(y_t)
}

void fill(const py::dict& arguments, Rotary& c) {
  GRADMEM_READ(dtype) GRADMEM_READ(table_dtype) GRADMEM_READ(threads) GRADMEM_READ(batch) GRADMEM_READ(heads)
  GRADMEM_READ(length) GRADMEM_READ(d) GRADMEM_READ(half) GRADMEM_READ(x) GRADMEM_READ(y) GRADMEM_READ(cos)
  GRADMEM_READ(sin) GRADMEM_READ(transposed)
}

void fill(const py::dict& arguments, InnerSGDForward& c) {
  fill(arguments, static_cast<InnerSGD&>(c));
  GRADMEM_READ(memory) GRADMEM_READ(memory_t) GRADMEM_READ(y) GRADMEM_READ(y_t)
}

void fill(const py::dict& arguments, InnerSGDBackward& c) {
  fill(arguments, static_cast<InnerSGD&>(c));
  GRADMEM_READ(a) GRADMEM_READ(b) GRADMEM_READ(dg) GRADMEM_READ(dg_t) GRADMEM_READ(dr) GRADMEM_READ(dr_t)
}

}  // namespace

void bind_rows(py::module_& module) {
  bind(module, "norm_forward", &Kernels::norm_forward, fill);
  bind(module, "norm_backward", &Kernels::norm_backward, fill);
  bind(module, "activation_forward", &Kernels::activation_forward, fill);
  bind(module, "activation_backward", &Kernels::activation_backward, fill);
  bind(module, "rotary", &Kernels::rotary, fill);
  bind(module, "inner_sgd_forward", &Kernels::inner_sgd_forward, fill);
  bind(module, "inner_sgd_backward", &Kernels::inner_sgd_backward, fill);
}

}  // namespace gradmem
