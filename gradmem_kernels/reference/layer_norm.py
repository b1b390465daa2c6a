"""LayerNorm kernels. With n = (x - mean(x)) * r, r = rsqrt(var(x) + eps): y = n * weight + bias.

Derivation: docs/layer_norm.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_kernels.reference.common import add_, cast, mul, mul_, sub_, sum_rows, wide


def forward(x, aux, *, eps):
    x, weight, bias = x
    y, mean, rstd = torch.native_layer_norm(wide(x), x.shape[-1:], wide(weight), wide(bias), eps)
    return (y.to(x.dtype),), (mean, rstd)


def backward(x, aux, y, saved, y_bar, needs, *, eps):
    none = (None,) * 3
    x_bar, _ = dual_backward(x, aux, none, y, (None,), saved, y_bar, (None,), needs, (False,) * 3, eps=eps)
    return x_bar


def dual_forward(x, aux, x_t, *, eps):
    y, saved = forward(x, aux, eps=eps)
    (x, weight, _), (x_t, weight_t, bias_t) = x, map(wide, x_t)
    n = _normalised(x, saved)
    # y_t = n_t * weight + n * weight_t + bias_t
    y_t = None if x_t is None else mul_(_project(x_t, n, saved[1]), wide(weight))
    y_t = add_(y_t, mul(n, weight_t))
    if bias_t is not None:
        y_t = bias_t.expand_as(n).clone() if y_t is None else add_(y_t, bias_t)
    return y, (y_t.to(x.dtype),), saved


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, eps):
    (x, weight, bias), (x_t, weight_t, _), (_, rstd) = x, map(wide, x_t), saved
    a, b, w = wide(y_bar[0]), wide(y_t_bar[0]), wide(weight)
    n = _normalised(x, saved)
    n_t = None if x_t is None or b is None else _project(x_t, n, rstd)

    dx = dw = dc = dx_t = dw_t = dc_t = None
    dn_t = mul(b, w) if needs[0] or needs_t[0] else None
    if needs[0]:
        dn = add_(mul(a, w), mul(b, weight_t))
        dx = None if dn is None else _project(dn, n, rstd)
        if n_t is not None:
            # tangent of r * (dn_t - mean(dn_t) - n * c), c = mean(n * dn_t), along x_t
            c, c_t = _mean(n * dn_t), _mean(n_t * dn_t)
            r_t = -rstd * rstd * _mean(n * x_t)
            centred = sub_(dn_t - _mean(dn_t), n * c)
            dx = add_(sub_(mul_(centred, r_t), (n_t * c + n * c_t) * rstd), dx)
        dx = cast(dx, x)
    if needs[1]:
        dw = cast(sum_rows(add_(mul(a, n), mul(b, n_t))), weight)
    if needs[2]:
        dc = cast(sum_rows(a), bias)
    if needs_t[0]:
        dx_t = cast(None if dn_t is None else _project(dn_t, n, rstd), x)
    if needs_t[1]:
        dw_t = cast(sum_rows(mul(b, n)), weight)
    if needs_t[2]:
        dc_t = cast(sum_rows(b), bias)
    return (dx, dw, dc), (dx_t, dw_t, dc_t)


def _normalised(x: Tensor, saved: tuple[Tensor, Tensor]) -> Tensor:
    mean, rstd = saved
    return mul_(wide(x) - mean, rstd)


def _project(g: Tensor, n: Tensor, rstd: Tensor) -> Tensor:
    """The (symmetric) Jacobian of n applied to g: r * (g - mean(g) - n * mean(n * g))."""
    return mul_(sub_(g - _mean(g), n * _mean(n * g)), rstd)


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)
