"""Inner update kernels: memory - lr * clip(grad). Derivation and names: docs/inner_sgd.md.

The memory is not read by the backward kernels, and the gradient only for clipping or for a tensor lr: what is not read
is None there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradmem_kernels.reference.common import add, cast, mul, wide

#: Added to the norm that is divided by.
EPS = 1e-6


def forward(x, aux, **options):
    y, _, saved = dual_forward(x, aux, (None,) * 3, **options)
    return y, saved


def backward(x, aux, y, saved, y_bar, needs, **options):
    x_bar, _ = dual_backward(x, aux, (None,) * 3, y, (None,), saved, y_bar, (None,), needs, (False,) * 3, **options)
    return x_bar


def dual_forward(x, aux, x_t, *, lr, clip_value, clip_norm):
    (memory, grad, rate), (memory_t, grad_t, rate_t) = map(wide, x), map(wide, x_t)
    rate = lr if rate is None else rate
    clip = _clip(grad, clip_value, clip_norm)
    # y = M - lr * u,  y_t = M_t - lr * u_t - lr_t * u,  u = clip(g)
    u = _scaled(clip, clip.h)
    y = None if memory is None else (memory - rate * u).to(x[0].dtype)
    y_t = _difference(memory_t, add(mul(rate, _jacobian(clip, _masked(clip, grad_t))), mul(rate_t, u)))
    if y_t is not None:
        y_t = y_t.to(next(t for t in (*x[:2], *x_t[:2]) if t is not None).dtype)
    return (y,), (y_t,), ()


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, lr, clip_value, clip_norm):
    like = next(t for t in (*y_bar, *y_t_bar) if t is not None)  # of the shape and dtype of memory and gradient
    (_, grad, rate), (_, grad_t, rate_t), a, b = map(wide, x), map(wide, x_t), wide(y_bar[0]), wide(y_t_bar[0])
    step = lr if rate is None else rate
    clip = _clip(grad, clip_value, clip_norm)
    u, h_t = _scaled(clip, clip.h), _masked(clip, grad_t)
    # cotangents of u and u_t
    du, du_t = _difference(None, add(mul(step, a), mul(rate_t, b))), _difference(None, mul(step, b))

    dm = dg = dr = dm_t = dg_t = dr_t = None
    if needs[0]:
        dm = cast(_difference(y_bar[0], None), like)
    if needs_t[0]:
        dm_t = cast(_difference(y_t_bar[0], None), like)
    if needs[1]:
        dg = cast(_masked(clip, add(_jacobian(clip, du), _jacobian_t(clip, h_t, du_t))), like)
    if needs_t[1]:
        dg_t = cast(_masked(clip, _jacobian(clip, du_t)), like)
    if needs[2]:
        dr = _reduce(add(mul(a, u), mul(b, _jacobian(clip, h_t))), x[2])
    if needs_t[2]:
        dr_t = _reduce(mul(b, u), x[2])
    return (dm, dg, dr), (dm_t, dg_t, dr_t)


class _Clip(NamedTuple):
    """u = s * h with h = clamp(g): what its derivatives are made of. None where there is no such clipping."""

    h: Tensor | None
    mask: Tensor | None = None  # dh/dg
    n: Tensor | None = None  # |h| per sample, 1 where it is not clipped
    s: Tensor | None = None  # c / (n + EPS), 1 where it is not clipped
    k: Tensor | None = None  # s / ((n + EPS) * n), 0 where it is not clipped: ds = -k * <h, dh>


def _clip(g: Tensor | None, clip_value: float | None, clip_norm: float | None) -> _Clip:
    if g is None:
        return _Clip(None)
    h = g if clip_value is None else g.clamp(-clip_value, clip_value)
    mask = None if clip_value is None else (g.abs() <= clip_value).to(g.dtype)
    if clip_norm is None:
        return _Clip(h, mask)
    n = _dot(h, h).sqrt()
    clipped = n > clip_norm
    n = torch.where(clipped, n, 1)
    s = torch.where(clipped, clip_norm / (n + EPS), 1)
    return _Clip(h, mask, n, s, torch.where(clipped, s / ((n + EPS) * n), 0))


def _masked(clip: _Clip, g: Tensor | None) -> Tensor | None:
    return g if clip.mask is None else mul(clip.mask, g)


def _scaled(clip: _Clip, v: Tensor | None) -> Tensor | None:
    return v if clip.s is None else mul(clip.s, v)


def _jacobian(clip: _Clip, v: Tensor | None) -> Tensor | None:
    """J v = s * v - k * h * <h, v>, where J = du/dh is symmetric."""
    if v is None or clip.s is None:
        return v
    return clip.s * v - clip.k * _dot(clip.h, v) * clip.h


def _jacobian_t(clip: _Clip, h_t: Tensor | None, v: Tensor | None) -> Tensor | None:
    """The tangent of J v along h_t, v fixed: s_t * v - k_t * h * <h, v> - k * (h_t * <h, v> + h * <h_t, v>)."""
    if clip.s is None or h_t is None or v is None:
        return None
    h, n, k, h_dot_t = clip.h, clip.n, clip.k, _dot(clip.h, h_t)
    s_t = -k * h_dot_t
    k_t = s_t / n * (2 / (n + EPS) + 1 / n)
    h_dot_v = _dot(h, v)
    return s_t * v - (k_t * h_dot_v + k * _dot(h_t, v)) * h - k * h_dot_v * h_t


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products per sample, [B, 1, ..]."""
    product = a * b
    return product.sum(tuple(range(1, product.ndim)), keepdim=True) if product.ndim > 1 else product


def _difference(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """A new tensor a - b: torch takes an input that a kernel returns as it is for a view."""
    if b is None:
        return None if a is None else a.clone()
    return -b if a is None else a - b


def _reduce(terms: Tensor | None, rate: Tensor) -> Tensor:
    """Minus the sum of ``terms`` over what ``rate`` was broadcast along."""
    return cast(None if terms is None else terms.sum_to_size(rate.shape).neg(), rate)
