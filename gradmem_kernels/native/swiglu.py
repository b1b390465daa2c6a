"""SwiGLU in C++: y = f(gate) * up, f(x) = x * sigmoid(x). Derivation: docs/swiglu.md."""

from __future__ import annotations

from torch import Tensor

from gradmem_kernels.native.activation import operators
from gradmem_kernels.native.common import refusal as refusal_of
from gradmem_kernels.operators.activation import SwiGLU


def refusal(gate: Tensor | None = None, up: Tensor | None = None) -> str | None:
    """Why these kernels cannot serve such tensors; ``None`` if they can."""
    return refusal_of(gate)


_kernels = SwiGLU(operators)
forward, backward = _kernels.forward, _kernels.backward
dual_forward, dual_backward = _kernels.dual_forward, _kernels.dual_backward
double_backward = _kernels.double_backward
