// Bindings of norms, activations, rotary and inner_sgd.

#include "bind.h"

namespace gradmem {
namespace {

void read_norm(const py::dict& arguments, Norm& c) {
  GRADMEM_READ(dtype) GRADMEM_READ(threads) GRADMEM_READ(rows) GRADMEM_READ(width) GRADMEM_READ(inner)
}

void read_activation(const py::dict& arguments, Activation& c) {
  GRADMEM_READ(dtype) GRADMEM_READ(threads) GRADMEM_READ(form) GRADMEM_READ(rows) GRADMEM_READ(width) GRADMEM_READ(x)
  GRADMEM_READ(up) GRADMEM_READ(x_t) GRADMEM_READ(up_t)
}

void read_inner_sgd(const py::dict& arguments, InnerSGD& c) {
  GRADMEM_READ(dtype) GRADMEM_READ(threads) GRADMEM_READ(batch) GRADMEM_READ(width) GRADMEM_READ(lr)
  GRADMEM_READ(clamp) GRADMEM_READ(clip_value) GRADMEM_READ(clip_norm) GRADMEM_READ(grad) GRADMEM_READ(grad_t)
  GRADMEM_READ(rate) GRADMEM_READ(rate_t)
}

}  // namespace

void bind_rows(py::module_& module) {
  module.def("norm_forward", [](const py::dict& arguments) {
    NormForward c{};
    read_norm(arguments, c);
    GRADMEM_READ(eps) GRADMEM_READ(x) GRADMEM_READ(x_t) GRADMEM_READ(r) GRADMEM_READ(r_t) GRADMEM_READ(w)
    GRADMEM_READ(w_t) GRADMEM_READ(c) GRADMEM_READ(c_t) GRADMEM_READ(y) GRADMEM_READ(y_t) GRADMEM_READ(s)
    GRADMEM_READ(s_t) GRADMEM_READ(rstd) GRADMEM_READ(mean)
    py::gil_scoped_release release;
    kernels().norm_forward(c);
  });
  module.def("norm_backward", [](const py::dict& arguments) {
    NormBackward c{};
    read_norm(arguments, c);
    GRADMEM_READ(x) GRADMEM_READ(x_t) GRADMEM_READ(a) GRADMEM_READ(b) GRADMEM_READ(g) GRADMEM_READ(h) GRADMEM_READ(w)
    GRADMEM_READ(w_t) GRADMEM_READ(c_t) GRADMEM_READ(rstd) GRADMEM_READ(mean) GRADMEM_READ(dx) GRADMEM_READ(dx_t)
    GRADMEM_READ(y_t) GRADMEM_READ(dw) GRADMEM_READ(dw_t) GRADMEM_READ(dc) GRADMEM_READ(dc_t)
    py::gil_scoped_release release;
    kernels().norm_backward(c);
  });
  module.def("activation_forward", [](const py::dict& arguments) {
    ActivationForward c{};
    read_activation(arguments, c);
    GRADMEM_READ(y) GRADMEM_READ(y_t)
    py::gil_scoped_release release;
    kernels().activation_forward(c);
  });
  module.def("activation_backward", [](const py::dict& arguments) {
    ActivationBackward c{};
    read_activation(arguments, c);
    GRADMEM_READ(a) GRADMEM_READ(b) GRADMEM_READ(dx) GRADMEM_READ(dx_t) GRADMEM_READ(dup) GRADMEM_READ(dup_t)
    GRADMEM_READ(y_t)
    py::gil_scoped_release release;
    kernels().activation_backward(c);
  });
  module.def("rotary", [](const py::dict& arguments) {
    Rotary c{};
    GRADMEM_READ(dtype) GRADMEM_READ(table_dtype) GRADMEM_READ(threads) GRADMEM_READ(batch) GRADMEM_READ(heads)
    GRADMEM_READ(length) GRADMEM_READ(d) GRADMEM_READ(half) GRADMEM_READ(x) GRADMEM_READ(y) GRADMEM_READ(cos)
    GRADMEM_READ(sin) GRADMEM_READ(transposed)
    py::gil_scoped_release release;
    kernels().rotary(c);
  });
  module.def("inner_sgd_forward", [](const py::dict& arguments) {
    InnerSGDForward c{};
    read_inner_sgd(arguments, c);
    GRADMEM_READ(memory) GRADMEM_READ(memory_t) GRADMEM_READ(y) GRADMEM_READ(y_t)
    py::gil_scoped_release release;
    kernels().inner_sgd_forward(c);
  });
  module.def("inner_sgd_backward", [](const py::dict& arguments) {
    InnerSGDBackward c{};
    read_inner_sgd(arguments, c);
    GRADMEM_READ(a) GRADMEM_READ(b) GRADMEM_READ(dg) GRADMEM_READ(dg_t) GRADMEM_READ(dr) GRADMEM_READ(dr_t)
    py::gil_scoped_release release;
    kernels().inner_sgd_backward(c);
  });
}

}  // namespace gradmem
