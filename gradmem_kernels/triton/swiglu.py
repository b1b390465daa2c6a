"""SwiGLU on Triton: y = f(gate) * up, f(x) = x * sigmoid(x). Derivation: docs/swiglu.md."""

from __future__ import annotations

from gradmem_kernels.triton import activation
from gradmem_kernels.triton.common import refusal as refusal_of

FORM = "silu"


def refusal(gate=None, up=None):
    """Why these kernels cannot serve such tensors; ``None`` if they can."""
    return refusal_of(gate)


def forward(x, aux):
    return (activation.forward(x, FORM),), ()


def backward(x, aux, y, saved, y_bar, needs):
    return activation.backward(x, *y_bar, needs, FORM)


def dual_forward(x, aux, x_t):
    y, y_t = activation.dual_forward(x, x_t, FORM)
    return (y,), (y_t,), ()


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t):
    return activation.dual_backward(x, x_t, *y_bar, *y_t_bar, needs, needs_t, FORM)


def double_backward(x, aux, x_t, y, saved, y_bar, needs):
    x_bar, y_t = activation.double_backward(x, x_t, *y_bar, needs, FORM)
    return x_bar, (y_t,)
