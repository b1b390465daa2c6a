"""What swiglu and gelu share on Triton: ``y = f(x) * up``, with ``up`` absent in gelu.

Derivations: docs/swiglu.md, docs/gelu.md.

Two operators serve all orders. A plain backward is the cotangent of the tangents, ``x_t_bar = backward(x; y_t_bar)``,
with the output's cotangent in the place of ``b``.
"""

from __future__ import annotations

import torch
import triton

from gradmem_kernels.operators.define import define
from gradmem_kernels.operators.rows import flat_or_rows, mapped_over_rows, parts, stacked
from gradmem_kernels.triton import activation_kernels as kernels
from gradmem_kernels.triton.common import accumulator, on_device

#: Elements and warps of a program: a thread has 16 bytes of each half-precision tensor, the widest access.
BLOCK, WARPS = 1024, 4

NONE, NEITHER = (None, None), (False, False)


def forward(x, form):
    return _forward(*x, *NONE, form)


def backward(x, y_bar, needs, form):
    return dual_backward(x, NONE, None, y_bar, NEITHER, needs, form)[1]


def dual_forward(x, x_t, form):
    return _forward(*x, *x_t, form).unbind(0)


def dual_backward(x, x_t, a, b, needs, needs_t, form):
    if b is None:
        zeros = tuple(torch.zeros_like(t) if need else None for t, need in zip(x, needs_t, strict=True))
        return backward(x, a, needs, form), zeros
    dx, dup, _ = _backward(*x, *x_t, a, b, needs, needs_t, False, form)
    (dx, dx_t), (dup, dup_t) = parts(dx, (needs[0], needs_t[0])), parts(dup, (needs[1], needs_t[1]))
    return (dx, dup), (dx_t, dup_t)


def double_backward(x, x_t, b, needs, form):
    dx, dup, y_t = _backward(*x, *x_t, None, b, needs, NEITHER, True, form)
    return tuple(t if need else None for t, need in zip((dx, dup), needs, strict=True)), y_t


def _forward_meta(x, up, x_t, up_t, form):
    """``y``, or ``y`` and ``y_t`` in one, not written."""
    return stacked(x, 1 if x_t is None and up_t is None else 2)


def _forward_launch(x, up, x_t, up_t, form):
    out = _forward_meta(x, up, x_t, up_t, form)
    y, y_t = parts(out, (True, x_t is not None or up_t is not None))
    _launch(kernels.forward_kernel, (x, up, x_t, up_t), (y, y_t), form)
    return out


def _backward_meta(x, up, x_t, up_t, a, b, needs, needs_t, tangent, form):
    """``dx`` and ``dx_t`` in one, ``dup`` and ``dup_t`` in one, and ``y_t``, not written."""
    return (stacked(x, needs[0] + needs_t[0]), stacked(x, needs[1] + needs_t[1]), stacked(x, int(tangent)))


def _backward_launch(x, up, x_t, up_t, a, b, needs, needs_t, tangent, form):
    out = _backward_meta(x, up, x_t, up_t, a, b, needs, needs_t, tangent, form)
    dx, dx_t = parts(out[0], (needs[0], needs_t[0]))
    dup, dup_t = parts(out[1], (needs[1], needs_t[1]))
    if not any(needs) and not tangent:
        x_t = up_t = a = None
    _launch(kernels.backward_kernel, (x, up, x_t, up_t, a, b), (dx, dx_t, dup, dup_t, out[2] if tangent else None),
            form)
    return out


def _launch(kernel, inputs, outputs, form):
    rows, width, inputs, strides = flat_or_rows(*inputs)
    tiles = triton.cdiv(width, BLOCK)
    if rows * tiles > 0:
        with on_device(inputs[0]):
            kernel[rows * tiles,](*inputs, *outputs, *strides, width, tiles, FORM=form,
                                  ACC=accumulator(inputs[0].dtype), BLOCK=BLOCK, num_warps=WARPS)


_forward = define(
    "activation_forward", "(Tensor x, Tensor? up, Tensor? x_t, Tensor? up_t, str form) -> Tensor",
    _forward_launch, _forward_meta, mapped=mapped_over_rows)
_backward = define(
    "activation_backward",
    "(Tensor x, Tensor? up, Tensor? x_t, Tensor? up_t, Tensor? a, Tensor b, bool[] needs, bool[] needs_t, "
    "bool tangent, str form) -> (Tensor, Tensor, Tensor)", _backward_launch, _backward_meta, mapped=mapped_over_rows)
