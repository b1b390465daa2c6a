"""LayerNorm kernels. With n = (x - mean(x)) * r, r = rsqrt(var(x) + eps): y = n * weight + bias.

Derivation: docs/layer_norm.md.
"""

from __future__ import annotations

from gradmem_kernels.reference import norm


def forward(x, aux, *, eps, residual=None):
    return norm.forward(x, residual, eps=eps, centred=True)


def backward(x, aux, y, saved, y_bar, needs, *, eps):
    return norm.backward(x, saved, y_bar, needs, centred=True)


def dual_forward(x, aux, x_t, *, eps, residual=None, residual_t=None):
    return norm.dual_forward(x, x_t, residual, residual_t, eps=eps, centred=True)


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, eps):
    return norm.dual_backward(x, x_t, saved, y_bar, y_t_bar, needs, needs_t, centred=True)
