"""What rms_norm and layer_norm share: y = n * weight + bias, n = x * r, r = rsqrt(mean(x^2) + eps).

In layer_norm (``centred``) mean(x) is taken from x first; rms_norm has no bias. Derivations: docs/rms_norm.md,
docs/layer_norm.md. A ``residual`` is added to x first, and the sum is the second output. The backward kernels find
the sum in the place of x, and its cotangent behind that of y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_kernels.reference.common import add, add_, addcmul_, cast, is_wrapped, mul, mul_, sum_rows, wide


def forward(x, residual, *, eps, centred):
    x, weight, bias = x
    s = x if residual is None else x + residual
    n, saved = _normalise(wide(s), eps, centred)
    y = _scaled(n, weight, bias).to(x.dtype)
    return (y,) if residual is None else (y, s), saved


def backward(x, saved, y_bar, needs, *, centred):
    none = (None,) * 3
    return dual_backward(x, none, saved, y_bar, (None,), needs, (False,) * 3, centred=centred)[0]


def dual_forward(x, x_t, residual, residual_t, *, eps, centred):
    (x, weight, bias), (x_t, weight_t, bias_t) = x, x_t
    s, s_t = (x, x_t) if residual is None else _sums(x, residual, x_t, residual_t)
    n, saved = _normalise(wide(s), eps, centred)
    # y_t = n_t * weight + n * weight_t + bias_t
    y_t = None if s_t is None else mul_(_project(wide(s_t), n, saved[0], centred), wide(weight))
    if weight_t is not None:
        y_t = addcmul_(y_t, n, wide(weight_t))
    if bias_t is not None:
        y_t = add_(y_t, wide(bias_t) if y_t is not None else wide(bias_t).expand_as(n).clone())
    y, y_t = _scaled(n, weight, bias).to(x.dtype), y_t.to(x.dtype)
    if residual is None:
        return (y,), (y_t,), saved
    return (y, s), (y_t, torch.zeros_like(s) if s_t is None else s_t), saved


def dual_backward(x, x_t, saved, y_bar, y_t_bar, needs, needs_t, *, centred):
    (x, weight, bias), (x_t, weight_t, _), (rstd, *mean) = x, map(wide, x_t), saved
    (a, g), (b, h) = (map(wide, (*bar, None)[:2]) for bar in (y_bar, y_t_bar))
    w = wide(weight)
    n = mul_(wide(x) - mean[0], rstd) if centred else wide(x) * rstd
    n_t = None if x_t is None or b is None or not any(needs[:2]) else _project(x_t, n, rstd, centred)
    # e = dn_t - mean(dn_t) - c * n,  c = mean(n * dn_t)
    dn_t = mul(b, w) if needs[0] or needs_t[0] else None
    c = None if dn_t is None else _mean(n * dn_t)
    e = None if dn_t is None else _without(dn_t, n, c, centred)

    dx = dw = dc = dx_t = dw_t = dc_t = None
    if needs[0]:
        # dx = r * (dn - mean(dn) - (mean(n * dn) + mean(n_t * dn_t)) * n - c * n_t - r * mean(n * x_t) * e) + g
        dn = add_(mul(a, w), mul(b, weight_t))
        c_n = None if dn is None else _mean(n * dn)
        if dn is not None and centred:
            dn = dn.sub_(_mean(dn))
        if n_t is not None:
            c_n = add(c_n, _mean(n_t * dn_t))
            dn = addcmul_(addcmul_(dn, n_t, -c), e, -rstd * _mean(n * x_t))
        dx = _plus(None if dn is None else mul_(addcmul_(dn, n, -c_n), rstd), g, x)
    if needs[1]:
        dw = cast(sum_rows(add_(mul(a, n), mul(b, n_t))), weight)
    if needs[2]:
        dc = cast(sum_rows(a), bias)
    if needs_t[0]:
        dx_t = _plus(None if e is None else mul_(e, rstd), h, x)
    if needs_t[1]:
        dw_t = cast(sum_rows(mul(b, n)), weight)
    if needs_t[2]:
        dc_t = cast(sum_rows(b), bias)
    return (dx, dw, dc), (dx_t, dw_t, dc_t)


def _sums(x: Tensor, residual: Tensor, x_t: Tensor | None, residual_t: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x + residual and its tangent, which lie together."""
    if x_t is None and residual_t is None:
        return x + residual, None
    x_t, residual_t = (torch.zeros_like(x) if t is None else t for t in (x_t, residual_t))
    if any(map(is_wrapped, (x, residual, x_t, residual_t))):
        return x + residual, x_t + residual_t
    both = x.new_empty(2, *x.shape)
    return torch.add(x, residual, out=both[0]), torch.add(x_t, residual_t, out=both[1])


def _plus(t: Tensor | None, more: Tensor | None, like: Tensor) -> Tensor:
    """t, a temporary, and more in the dtype of ``like``; never ``more`` itself."""
    return more.to(like.dtype, copy=True) if t is None and more is not None else cast(add_(t, more), like)


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
