"""SwiGLU kernels: y = f(gate) * up, f(x) = x * sigmoid(x). Derivation: docs/swiglu.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem_kernels.reference.common import add, cast, mul, mul_, wide


def forward(x, aux):
    gate, up = x
    return (mul_(F.silu(wide(gate)), wide(up)).to(gate.dtype),), ()


def backward(x, aux, y, saved, y_bar, needs):
    (gate, up), dy = x, wide(y_bar[0])
    dgate = _times_f1(dy * wide(up), wide(gate)).to(gate.dtype) if needs[0] else None
    dup = mul_(F.silu(wide(gate)), dy).to(up.dtype) if needs[1] else None
    return dgate, dup


def dual_forward(x, aux, x_t):
    (gate, up), (gate_t, up_t) = map(wide, x), map(wide, x_t)
    f = F.silu(gate)
    # y_t = f'(gate) * gate_t * up + f(gate) * up_t
    y_t = add(_times_f1(mul(gate_t, up), gate), mul(f, up_t))
    return (mul_(f, up).to(x[0].dtype),), (y_t.to(x[0].dtype),), ()


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t):
    (gate, up), (gate_t, up_t), a, b = map(wide, x), map(wide, x_t), wide(y_bar[0]), wide(y_t_bar[0])
    f = F.silu(gate) if needs[1] or needs_t[1] else None
    b_gate_t = mul(b, gate_t) if any(needs) else None

    dgate = dup = dgate_t = dup_t = None
    if needs[1]:
        # f(gate) * a + f'(gate) * b * gate_t
        dup = cast(add(mul(f, a), _times_f1(b_gate_t, gate)), x[1])
    if needs_t[1]:
        dup_t = cast(None if b is None else mul_(f, b), x[1])
    if needs_t[0]:
        dgate_t = cast(_times_f1(mul(b, up), gate), x[0])
    if needs[0]:
        # f'(gate) * (a * up + b * up_t) + f''(gate) * b * gate_t * up
        dgate = _times_f1(add(mul(a, up), mul(b, up_t)), gate)
        if b_gate_t is not None:
            dgate = add(dgate, mul_(mul_(b_gate_t, up), _f2(gate)))
        dgate = cast(dgate, x[0])
    return (dgate, dup), (dgate_t, dup_t)


def _times_f1(g: Tensor | None, x: Tensor) -> Tensor | None:
    """g * f'(x), f'(x) = s * (1 + x * (1 - s)), s = sigmoid(x), in one pass."""
    return None if g is None else torch.ops.aten.silu_backward(g, x)


def _f2(x: Tensor) -> Tensor:
    """f''(x) = s * (1 - s) * (2 + x * (1 - 2 * s)), s = sigmoid(x)."""
    s = torch.sigmoid(x)
    f2 = torch.add(0.5, s, alpha=-1).mul_(x).add_(1).mul_(s)
    return f2.mul_(s.neg_().add_(1)).mul_(2)
