"""LayerNorm on Triton. With n = (x - mean(x)) * r, r = rsqrt(var(x) + eps): y = n * weight + bias.

Derivation: docs/layer_norm.md.
"""

from __future__ import annotations

from gradmem_kernels.operators.norm import LayerNorm
from gradmem_kernels.triton.common import refusal as refusal_of
from gradmem_kernels.triton.norm import operators


def refusal(x=None, weight=None, bias=None):
    """Why these kernels cannot serve such tensors; ``None`` if they can."""
    return refusal_of(x)


_kernels = LayerNorm(operators)
forward, backward = _kernels.forward, _kernels.backward
dual_forward, dual_backward = _kernels.dual_forward, _kernels.dual_backward
double_backward = _kernels.double_backward
