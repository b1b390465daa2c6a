#include "bind.h"

namespace gradmem {
namespace {

void fill(const py::dict& arguments, Attention& c) {
  GRADMEM_READ(dtype) GRADMEM_READ(threads) GRADMEM_READ(batch) GRADMEM_READ(heads) GRADMEM_READ(kv_heads)
  GRADMEM_READ(rows) GRADMEM_READ(keys) GRADMEM_READ(d) GRADMEM_READ(q) GRADMEM_READ(k) GRADMEM_READ(v)
  GRADMEM_READ(q_t) GRADMEM_READ(k_t) GRADMEM_READ(v_t) GRADMEM_READ(causal) GRADMEM_READ(scale) GRADMEM_READ(window)
  GRADMEM_READ(softcap) GRADMEM_READ(dropout) GRADMEM_READ(seed) GRADMEM_READ(threshold) GRADMEM_READ(seqlens)
  GRADMEM_READ(packed) GRADMEM_READ(mask) GRADMEM_READ(bias) GRADMEM_READ(bias_dtype) GRADMEM_READ(tangent_rows)
}

void fill(const py::dict& arguments, AttentionForward& c) {
  fill(arguments, static_cast<Attention&>(c));
  GRADMEM_READ(known) GRADMEM_READ(o) GRADMEM_READ(o_t) GRADMEM_READ(lse) GRADMEM_READ(mu)
}

void fill(const py::dict& arguments, AttentionBackward& c) {
  fill(arguments, static_cast<Attention&>(c));
  GRADMEM_READ(o) GRADMEM_READ(o_t) GRADMEM_READ(a) GRADMEM_READ(b) GRADMEM_READ(lse) GRADMEM_READ(mu)
  GRADMEM_READ(dq) GRADMEM_READ(dk) GRADMEM_READ(dv) GRADMEM_READ(dq_t) GRADMEM_READ(dk_t) GRADMEM_READ(dv_t)
  GRADMEM_READ(grad_rows)
}

}  // namespace

void bind_attention(py::module_& module) {
  bind(module, "attention_forward", &Kernels::attention_forward, fill);
  bind(module, "attention_backward", &Kernels::attention_backward, fill);
}

}  // namespace gradmem
