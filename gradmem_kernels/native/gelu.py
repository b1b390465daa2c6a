"""GELU in C++: y = f(x) = x * Phi(x), Phi exact or by tanh. Derivation: docs/gelu.md."""

from __future__ import annotations

from torch import Tensor

from gradmem_kernels.native.activation import operators
from gradmem_kernels.native.common import refusal as refusal_of
from gradmem_kernels.operators.activation import GELU


def refusal(x: Tensor | None = None) -> str | None:
    """Why these kernels cannot serve such tensors; ``None`` if they can."""
    return refusal_of(x)


_kernels = GELU(operators)
forward, backward = _kernels.forward, _kernels.backward
dual_forward, dual_backward = _kernels.dual_forward, _kernels.dual_backward
double_backward = _kernels.double_backward
