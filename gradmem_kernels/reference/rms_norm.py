"""RMSNorm kernels. With n = x * r, r = rsqrt(mean(x^2) + eps): y = n * weight. Derivation: docs/rms_norm.md."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x, aux, *, eps):
    x, weight = x
    n, rstd = _normalise(x, eps)
    return ((n * weight).to(x.dtype),), (rstd,)


def backward(x, aux, y, saved, y_bar, needs, *, eps):
    (x, weight), (rstd,), (dy,) = x, saved, y_bar
    n, dy = _wide(x) * rstd, _wide(dy)
    dx = _project(dy * weight, n, rstd).to(x.dtype) if needs[0] else None
    dweight = _sum_rows(dy * n).to(weight.dtype) if needs[1] else None
    return dx, dweight


def dual_forward(x, aux, x_t, *, eps):
    (x, weight), (x_t, weight_t) = x, x_t
    n, rstd = _normalise(x, eps)
    y_t = 0
    if x_t is not None:
        y_t = _project(_wide(x_t), n, rstd) * weight
    if weight_t is not None:
        y_t = y_t + n * weight_t
    return ((n * weight).to(x.dtype),), (y_t.to(x.dtype),), (rstd,)


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, eps):
    (x, weight), (x_t, weight_t), (rstd,), (a,), (b,) = x, x_t, saved, y_bar, y_t_bar
    n = _wide(x) * rstd
    a, b, x_t = _wide(a), _wide(b), _wide(x_t)
    n_t = None if x_t is None else _project(x_t, n, rstd)

    # cotangents of n and n_t
    dn = _add(None if a is None else a * weight, None if b is None or weight_t is None else b * weight_t)
    dn_t = None if b is None else b * weight

    dx = dweight = dx_t = dweight_t = None
    if needs[0]:
        dx = None if dn is None else _project(dn, n, rstd)
        if dn_t is not None and x_t is not None:
            # tangent of r * (dn_t - n * c), c = mean(n * dn_t), along x_t
            c, c_t = _mean(n * dn_t), _mean(n_t * dn_t)
            rstd_t = -rstd * rstd * _mean(n * x_t)
            dx = _add(dx, rstd_t * (dn_t - n * c) - rstd * (n_t * c + n * c_t))
        dx = torch.zeros_like(x) if dx is None else dx.to(x.dtype)
    if needs[1]:
        terms = _add(None if a is None else a * n, None if b is None or n_t is None else b * n_t)
        dweight = torch.zeros_like(weight) if terms is None else _sum_rows(terms).to(weight.dtype)
    if needs_t[0]:
        dx_t = torch.zeros_like(x) if dn_t is None else _project(dn_t, n, rstd).to(x.dtype)
    if needs_t[1]:
        dweight_t = torch.zeros_like(weight) if b is None else _sum_rows(b * n).to(weight.dtype)
    return (dx, dweight), (dx_t, dweight_t)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = _wide(x)
    rstd = torch.rsqrt(_mean(x * x) + eps)
    return x * rstd, rstd


def _project(g: Tensor, n: Tensor, rstd: Tensor) -> Tensor:
    """The (symmetric) Jacobian of n applied to g: r * (g - n * mean(n * g))."""
    return rstd * (g - n * _mean(n * g))


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _sum_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _wide(x: Tensor | None) -> Tensor | None:
    """Half precision is computed in float32."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x
