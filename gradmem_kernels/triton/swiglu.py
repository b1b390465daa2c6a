"""SwiGLU on Triton: y = f(gate) * up, f(x) = x * sigmoid(x). Derivation: docs/swiglu.md."""

from __future__ import annotations

from gradmem_kernels.operators.activation import SwiGLU
from gradmem_kernels.triton.activation import operators
from gradmem_kernels.triton.common import refusal as refusal_of


def refusal(gate=None, up=None):
    """Why these kernels cannot serve such tensors; ``None`` if they can."""
    return refusal_of(gate)


_kernels = SwiGLU(operators)
forward, backward = _kernels.forward, _kernels.backward
dual_forward, dual_backward = _kernels.dual_forward, _kernels.dual_backward
double_backward = _kernels.double_backward
