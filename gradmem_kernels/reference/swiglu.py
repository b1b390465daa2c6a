"""SwiGLU kernels: y = f(gate) * up, f(x) = x * sigmoid(x). Derivation: docs/swiglu.md."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem_kernels.reference.common import add, addcmul_, by_samples, cast, is_wrapped, mul, mul_, wide

#: Elements that the kernels with many temporaries work on at a time on a CPU: what stays in its cache.
ELEMENTS = 2**18


def forward(x, aux):
    gate, up = x
    return (mul_(F.silu(wide(gate)), wide(up)).to(gate.dtype),), ()


def backward(x, aux, y, saved, y_bar, needs):
    (gate, up), dy = x, wide(y_bar[0])
    dgate = _times_f1_(dy * wide(up), wide(gate)).to(gate.dtype) if needs[0] else None
    dup = mul_(F.silu(wide(gate)), dy).to(up.dtype) if needs[1] else None
    return dgate, dup


def dual_forward(x, aux, x_t):
    y, y_t = _by_samples(_dual_forward, *x, *x_t)
    return (y,), (y_t,), ()


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t):
    out = _by_samples(partial(_dual_backward, needs, needs_t), *x, *x_t, *y_bar, *y_t_bar)
    return out[:2], out[2:]


def double_backward(x, aux, x_t, y, saved, y_bar, needs):
    *x_bar, y_t = _by_samples(partial(_double_backward, needs), *x, *x_t, *y_bar)
    return tuple(x_bar), (y_t,)


def _dual_forward(gate, up, gate_t, up_t):
    dtype = gate.dtype
    gate, up, gate_t, up_t = map(wide, (gate, up, gate_t, up_t))
    f = F.silu(gate)
    # y_t = f'(gate) * gate_t * up + f(gate) * up_t
    y_t = add(_times_f1_(mul(gate_t, up), gate), mul(f, up_t))
    return mul_(f, up).to(dtype), y_t.to(dtype)


def _dual_backward(needs, needs_t, gate, up, gate_t, up_t, a, b):
    x = gate, up
    gate, up, gate_t, up_t, a, b = map(wide, (gate, up, gate_t, up_t, a, b))
    b_gate_t = mul(b, gate_t) if any(needs) else None
    f, f1, f2 = _derivatives(gate, second=needs[0] and b_gate_t is not None)

    dgate = dup = dgate_t = dup_t = None
    if needs[0]:
        # f'(gate) * (a * up + b * up_t) + f''(gate) * b * gate_t * up
        dgate = mul(add(mul(a, up), mul(b, up_t)), f1)
        if b_gate_t is not None:
            dgate = addcmul_(dgate, mul_(f2, up), b_gate_t)
        dgate = cast(dgate, x[0])
    if needs[1]:
        # f(gate) * a + f'(gate) * b * gate_t
        dup = mul(f, a)
        if b_gate_t is not None:
            dup = addcmul_(dup, f1, b_gate_t)
        dup = cast(dup, x[1])
    if needs_t[0]:
        dgate_t = cast(mul(mul(b, up), f1), x[0])
    if needs_t[1]:
        dup_t = cast(mul(f, b), x[1])
    return dgate, dup, dgate_t, dup_t


def _double_backward(needs, gate, up, gate_t, up_t, b):
    x = gate, up
    gate, up, gate_t, up_t, b = map(wide, (gate, up, gate_t, up_t, b))
    f, f1, f2 = _derivatives(gate, second=needs[0] and gate_t is not None)
    gate_t_up = mul(gate_t, up)
    # y_t = f'(gate) * gate_t * up + f(gate) * up_t
    y_t = mul(f1, gate_t_up)
    if up_t is not None:
        y_t = addcmul_(y_t, f, up_t)
    dgate = dup = None
    if needs[0]:
        # (f'(gate) * up_t + f''(gate) * gate_t * up) * b
        dgate = mul(f1, up_t)
        if gate_t is not None:
            dgate = addcmul_(dgate, f2, gate_t_up)
        dgate = cast(mul_(dgate, b), x[0])
    if needs[1]:
        # f'(gate) * gate_t * b
        dup = cast(None if gate_t is None else mul_(mul_(f1, gate_t), b), x[1])
    return dgate, dup, y_t.to(x[0].dtype)


def _by_samples(kernel, *tensors):
    gate = tensors[0]
    if gate.device.type != "cpu" or gate.dim() == 0:
        return kernel(*tensors)
    return by_samples(kernel, ELEMENTS // max(1, gate[:1].numel()), *tensors)


def _times_f1_(g: Tensor | None, x: Tensor) -> Tensor | None:
    """g * f'(x), f'(x) = s * (1 + x * (1 - s)), s = sigmoid(x), in one pass and the place of ``g``, a temporary."""
    if g is None or is_wrapped(g) or is_wrapped(x):
        return None if g is None else torch.ops.aten.silu_backward(g, x)
    return torch.ops.aten.silu_backward(g, x, grad_input=g)


def _derivatives(x: Tensor, second: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """f, f' = s + f * (1 - s) and, on demand, f'' = s * (1 - s) * (2 + x - 2 * f) at ``x``, s = sigmoid(x)."""
    s = torch.sigmoid(x)
    f, rest = x * s, 1 - s
    f1 = torch.addcmul(s, f, rest)
    return f, f1, torch.sub(x, f, alpha=2).add_(2).mul_(s).mul_(rest) if second else None
