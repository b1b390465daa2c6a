"""RMSNorm kernels. With n = x * r, r = rsqrt(mean(x^2) + eps): y = n * weight. Derivation: docs/rms_norm.md."""

from __future__ import annotations

from gradmem_kernels.reference import norm


def forward(x, aux, *, eps, residual=None):
    return norm.forward((*x, None), residual, eps=eps, centred=False)


def backward(x, aux, y, saved, y_bar, needs, *, eps):
    return norm.backward((*x, None), saved, y_bar, (*needs, False), centred=False)[:2]


def dual_forward(x, aux, x_t, *, eps, residual=None, residual_t=None):
    return norm.dual_forward((*x, None), (*x_t, None), residual, residual_t, eps=eps, centred=False)


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, eps):
    x_bar, x_t_bar = norm.dual_backward((*x, None), (*x_t, None), saved, y_bar, y_t_bar, (*needs, False),
                                        (*needs_t, False), centred=False)
    return x_bar[:2], x_t_bar[:2]
