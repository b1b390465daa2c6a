"""GELU kernels: y = f(x) = x * Phi(x), Phi exact or by tanh. Derivation: docs/gelu.md."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem_kernels.reference.common import add_, cast, mul, mul_, wide

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def forward(x, aux, *, approximate):
    (x,) = x
    return (F.gelu(wide(x), approximate=approximate).to(x.dtype),), ()


def backward(x, aux, y, saved, y_bar, needs, *, approximate):
    (x,), (dy,) = x, y_bar
    return (_times_f1(wide(dy), wide(x), approximate).to(x.dtype),)


def dual_forward(x, aux, x_t, *, approximate):
    y, saved = forward(x, aux, approximate=approximate)
    # y_t = f'(x) * x_t
    return y, backward(x, aux, y, saved, x_t, (True,), approximate=approximate), saved


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, approximate):
    (x,), (x_t,), a, b = x, map(wide, x_t), wide(y_bar[0]), wide(y_t_bar[0])
    dx = dx_t = None
    if needs[0]:
        # a * f'(x) + b * x_t * f''(x)
        dx = _times_f1(a, wide(x), approximate)
        b_x_t = mul(b, x_t)
        if b_x_t is not None:
            dx = add_(dx, mul_(_f2(wide(x), approximate), b_x_t))
        dx = cast(dx, x)
    if needs_t[0]:
        dx_t = cast(_times_f1(b, wide(x), approximate), x)
    return (dx,), (dx_t,)


def _times_f1(g: Tensor | None, x: Tensor, approximate: str) -> Tensor | None:
    """g * f'(x) in one pass."""
    return None if g is None else torch.ops.aten.gelu_backward(g, x, approximate=approximate)


def _f2(x: Tensor, approximate: str) -> Tensor:
    square = x * x
    if approximate == "none":
        # f'' = phi * (2 - x^2), phi the normal density
        return (square * -0.5).exp_().mul_(square.neg_().add_(2)).mul_(1 / math.sqrt(2 * math.pi))
    # with t = tanh(u), u = sqrt(2/pi) * (x + CUBIC * x^3): f'' = (1 - t^2) * (u' + x * (u'' / 2 - t * u'^2))
    u1 = (square * (3 * CUBIC)).add_(1).mul_(SQRT_2_OVER_PI)
    t = square.mul_(CUBIC).add_(1).mul_(x).mul_(SQRT_2_OVER_PI).tanh_()
    f2 = torch.addcmul(3 * CUBIC * SQRT_2_OVER_PI * x, t * u1, u1, value=-1).mul_(x).add_(u1)
    return f2.mul_(t.mul_(t).neg_().add_(1))
