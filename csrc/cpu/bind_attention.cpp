#include "bind.h"

namespace gradmem {
namespace {

void read_inputs(const py::dict& arguments, Attention& c) {
#define FIELDS(F)                                                                                                  \
  F(dtype) F(threads) F(batch) F(heads) F(kv_heads) F(rows) F(keys) F(d) F(q) F(k) F(v) F(q_t) F(k_t) F(v_t)         \
  F(causal) F(scale) F(window) F(softcap) F(dropout) F(seed) F(threshold) F(seqlens) F(packed) F(mask) F(bias)       \
  F(bias_dtype) F(tangent_rows)
  FIELDS(GRADMEM_READ)
#undef FIELDS
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention_forward", [](const py::dict& arguments) {
    AttentionForward c{};
    read_inputs(arguments, c);
    GRADMEM_READ(known) GRADMEM_READ(o) GRADMEM_READ(o_t) GRADMEM_READ(lse) GRADMEM_READ(mu)
    py::gil_scoped_release release;
    kernels().attention_forward(c);
  });
  module.def("attention_backward", [](const py::dict& arguments) {
    AttentionBackward c{};
    read_inputs(arguments, c);
    GRADMEM_READ(o) GRADMEM_READ(o_t) GRADMEM_READ(a) GRADMEM_READ(b) GRADMEM_READ(lse) GRADMEM_READ(mu)
    GRADMEM_READ(dq) GRADMEM_READ(dk) GRADMEM_READ(dv) GRADMEM_READ(dq_t) GRADMEM_READ(dk_t) GRADMEM_READ(dv_t)
    GRADMEM_READ(grad_rows)
    py::gil_scoped_release release;
    kernels().attention_backward(c);
  });
}

}  // namespace gradmem
