"""What rms_norm and layer_norm share: y = n * weight + bias, n = x * r, r = rsqrt(mean(x^2) + eps).

In layer_norm (``centred``) mean(x) is taken from x first; rms_norm has no bias. Derivations: docs/rms_norm.md,
docs/layer_norm.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_kernels.reference.common import add, add_, addcmul_, cast, mul, mul_, sum_rows, wide


def forward(x, *, eps, centred):
    x, weight, bias = x
    n, saved = _normalise(wide(x), eps, centred)
    return (_scaled(n, weight, bias).to(x.dtype),), saved


def backward(x, saved, y_bar, needs, *, centred):
    none = (None,) * 3
    return dual_backward(x, none, saved, y_bar, (None,), needs, (False,) * 3, centred=centred)[0]


def dual_forward(x, x_t, *, eps, centred):
    (x, weight, bias), (x_t, weight_t, bias_t) = x, map(wide, x_t)
    n, saved = _normalise(wide(x), eps, centred)
    # y_t = n_t * weight + n * weight_t + bias_t
    y_t = None if x_t is None else mul_(_project(x_t, n, saved[0], centred), wide(weight))
    if weight_t is not None:
        y_t = addcmul_(y_t, n, weight_t)
    if bias_t is not None:
        y_t = add_(y_t, bias_t if y_t is not None else bias_t.expand_as(n).clone())
    return (_scaled(n, weight, bias).to(x.dtype),), (y_t.to(x.dtype),), saved


def dual_backward(x, x_t, saved, y_bar, y_t_bar, needs, needs_t, *, centred):
    (x, weight, bias), (x_t, weight_t, _), (rstd, *mean) = x, map(wide, x_t), saved
    a, b, w = wide(y_bar[0]), wide(y_t_bar[0]), wide(weight)
    n = mul_(wide(x) - mean[0], rstd) if centred else wide(x) * rstd
    n_t = None if x_t is None or b is None or not any(needs[:2]) else _project(x_t, n, rstd, centred)
    # e = dn_t - mean(dn_t) - c * n,  c = mean(n * dn_t)
    dn_t = mul(b, w) if needs[0] or needs_t[0] else None
    c = None if dn_t is None else _mean(n * dn_t)
    e = None if dn_t is None else _without(dn_t, n, c, centred)

    dx = dw = dc = dx_t = dw_t = dc_t = None
    if needs[0]:
        # dx = r * (dn - mean(dn) - (mean(n * dn) + mean(n_t * dn_t)) * n - c * n_t - r * mean(n * x_t) * e)
        dn = add_(mul(a, w), mul(b, weight_t))
        c_n = None if dn is None else _mean(n * dn)
        if dn is not None and centred:
            dn = dn.sub_(_mean(dn))
        if n_t is not None:
            c_n = add(c_n, _mean(n_t * dn_t))
            dn = addcmul_(addcmul_(dn, n_t, -c), e, -rstd * _mean(n * x_t))
        dx = cast(None if dn is None else mul_(addcmul_(dn, n, -c_n), rstd), x)
    if needs[1]:
        dw = cast(sum_rows(add_(mul(a, n), mul(b, n_t))), weight)
    if needs[2]:
        dc = cast(sum_rows(a), bias)
    if needs_t[0]:
        dx_t = cast(None if e is None else mul_(e, rstd), x)
    if needs_t[1]:
        dw_t = cast(sum_rows(mul(b, n)), weight)
    if needs_t[2]:
        dc_t = cast(sum_rows(b), bias)
    return (dx, dw, dc), (dx_t, dw_t, dc_t)


def _normalise(x: Tensor, eps: float, centred: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    if not centred:
        rstd = torch.rsqrt(_mean(x * x) + eps)
        return x * rstd, (rstd,)
    mean = _mean(x)
    x = x - mean
    rstd = torch.rsqrt(_mean(x * x) + eps)
    return x.mul_(rstd), (rstd, mean)


def _scaled(n: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return add_(mul_(n, wide(weight)), wide(bias))


def _project(g: Tensor, n: Tensor, rstd: Tensor, centred: bool) -> Tensor:
    """The (symmetric) Jacobian of n applied to g: r * (g - mean(g) - n * mean(n * g))."""
    return mul_(_without(g, n, _mean(n * g), centred), rstd)


def _without(g: Tensor, n: Tensor, c: Tensor, centred: bool) -> Tensor:
    """g - mean(g) - c * n."""
    rest = torch.addcmul(g, n, c, value=-1)
    return rest.sub_(_mean(g)) if centred else rest


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)
