"""LayerNorm in C++. With n = (x - mean(x)) * r, r = rsqrt(var(x) + eps): y = n * weight + bias.

Derivation: docs/layer_norm.md.
"""

from __future__ import annotations

from torch import Tensor

from gradmem_kernels.native.common import refusal as refusal_of
from gradmem_kernels.native.norm import operators
from gradmem_kernels.operators.norm import LayerNorm


def refusal(x: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None) -> str | None:
    """Why these kernels cannot serve such tensors; ``None`` if they can."""
    return refusal_of(x)


_kernels = LayerNorm(operators)
forward, backward = _kernels.forward, _kernels.backward
dual_forward, dual_backward = _kernels.dual_forward, _kernels.dual_backward
double_backward = _kernels.double_backward
