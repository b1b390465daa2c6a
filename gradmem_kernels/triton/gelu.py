"""GELU on Triton: y = f(x) = x * Phi(x), Phi exact or by tanh. Derivation: docs/gelu.md."""

from __future__ import annotations

from gradmem_kernels.triton import activation
from gradmem_kernels.triton.common import refusal as refusal_of

FORMS = {"none": "gelu", "tanh": "gelu_tanh"}


def refusal(x=None):
    """Why these kernels cannot serve such tensors; ``None`` if they can."""
    return refusal_of(x)


def forward(x, aux, *, approximate):
    return (activation.forward((*x, None), FORMS[approximate]),), ()


def backward(x, aux, y, saved, y_bar, needs, *, approximate):
    return activation.backward((*x, None), *y_bar, (*needs, False), FORMS[approximate])[:1]


def dual_forward(x, aux, x_t, *, approximate):
    y, y_t = activation.dual_forward((*x, None), (*x_t, None), FORMS[approximate])
    return (y,), (y_t,), ()


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, approximate):
    x_bar, x_t_bar = activation.dual_backward((*x, None), (*x_t, None), *y_bar, *y_t_bar, (*needs, False),
                                              (*needs_t, False), FORMS[approximate])
    return x_bar[:1], x_t_bar[:1]


def double_backward(x, aux, x_t, y, saved, y_bar, needs, *, approximate):
    x_bar, y_t = activation.double_backward((*x, None), (*x_t, None), *y_bar, (*needs, False), FORMS[approximate])
    return x_bar[:1], (y_t,)
