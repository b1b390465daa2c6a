"""GELU on Triton: y = f(x) = x * Phi(x), Phi exact or by tanh. Derivation: docs/gelu.md."""

from __future__ import annotations

from gradmem_kernels.operators.activation import GELU
from gradmem_kernels.triton.activation import operators
from gradmem_kernels.triton.common import refusal as refusal_of


def refusal(x=None):
    """Why these kernels cannot serve such tensors; ``None`` if they can."""
    return refusal_of(x)


_kernels = GELU(operators)
forward, backward = _kernels.forward, _kernels.backward
dual_forward, dual_backward = _kernels.dual_forward, _kernels.dual_backward
double_backward = _kernels.double_backward
