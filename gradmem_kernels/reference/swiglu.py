"""SwiGLU kernels: y = f(gate) * up, f(x) = x * sigmoid(x). Derivation: docs/swiglu.md."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem_kernels.reference.common import add, by_samples, cast, mul, mul_, wide

#: Elements that are worked on at a time on a CPU: what stays in its cache.
ELEMENTS = 2**16


def forward(x, aux):
    return _by_samples(_forward, *x), ()


def backward(x, aux, y, saved, y_bar, needs):
    return _by_samples(partial(_backward, needs), *x, *y_bar)


def dual_forward(x, aux, x_t):
    y, y_t = _by_samples(_dual_forward, *x, *x_t)
    return (y,), (y_t,), ()


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t):
    out = _by_samples(partial(_dual_backward, needs, needs_t), *x, *x_t, *y_bar, *y_t_bar)
    return out[:2], out[2:]


def double_backward(x, aux, x_t, y, saved, y_bar, needs):
    *x_bar, y_t = _by_samples(partial(_double_backward, needs), *x, *x_t, *y_bar)
    return tuple(x_bar), (y_t,)


def _forward(gate, up):
    return (mul_(F.silu(wide(gate)), wide(up)).to(gate.dtype),)


def _backward(needs, gate, up, dy):
    dy = wide(dy)
    dgate = _times_f1(dy * wide(up), wide(gate)).to(gate.dtype) if needs[0] else None
    dup = mul_(F.silu(wide(gate)), dy).to(up.dtype) if needs[1] else None
    return dgate, dup


def _dual_forward(gate, up, gate_t, up_t):
    dtype = gate.dtype
    gate, up, gate_t, up_t = map(wide, (gate, up, gate_t, up_t))
    f = F.silu(gate)
    # y_t = f'(gate) * gate_t * up + f(gate) * up_t
    y_t = add(_times_f1(mul(gate_t, up), gate), mul(f, up_t))
    return mul_(f, up).to(dtype), y_t.to(dtype)


def _dual_backward(needs, needs_t, gate, up, gate_t, up_t, a, b):
    x = gate, up
    gate, up, gate_t, up_t, a, b = map(wide, (gate, up, gate_t, up_t, a, b))
    f = F.silu(gate) if (needs[1] and a is not None) or needs_t[1] else None
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
            dgate = add(dgate, mul_(mul_(b_gate_t, up), _f2(gate, torch.sigmoid(gate))))
        dgate = cast(dgate, x[0])
    return dgate, dup, dgate_t, dup_t


def _double_backward(needs, gate, up, gate_t, up_t, b):
    x = gate, up
    gate, up, gate_t, up_t, b = map(wide, (gate, up, gate_t, up_t, b))
    # f' = s + f * (1 - s),  s = sigmoid(gate),  f = gate * s
    s = torch.sigmoid(gate)
    f = gate * s
    f1 = torch.addcmul(s + f, f, s, value=-1)
    # y_t = f' * gate_t * up + f * up_t
    f1_gate_t = mul(f1, gate_t)
    y_t = add(mul(f1_gate_t, up), mul(f, up_t)).to(x[0].dtype)
    # f' * b * up_t + f'' * b * gate_t * up,  f' * b * gate_t
    dgate = dup = None
    if needs[0]:
        dgate = mul(f1, up_t)
        if gate_t is not None:
            dgate = add(dgate, mul_(mul_(_f2(gate, s), gate_t), up))
        dgate = cast(mul_(dgate, b), x[0])
    if needs[1]:
        dup = cast(mul(f1_gate_t, b), x[1])
    return dgate, dup, y_t


def _by_samples(kernel, *tensors):
    gate = tensors[0]
    if gate.device.type != "cpu" or gate.dim() == 0:
        return kernel(*tensors)
    return by_samples(kernel, ELEMENTS // max(1, gate[:1].numel()), *tensors)


def _times_f1(g: Tensor | None, x: Tensor) -> Tensor | None:
    """g * f'(x), f'(x) = s * (1 + x * (1 - s)), s = sigmoid(x), in one pass."""
    return None if g is None else torch.ops.aten.silu_backward(g, x)


def _f2(x: Tensor, s: Tensor) -> Tensor:
    """f''(x) = s * (1 - s) * (2 + x * (1 - 2 * s)), s = sigmoid(x)."""
    f2 = torch.add(0.5, s, alpha=-1).mul_(x).add_(1).mul_(s)
    return f2.mul_(1 - s).mul_(2)
