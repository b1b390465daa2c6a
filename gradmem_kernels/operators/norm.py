"""rms_norm and layer_norm on two torch operators, whose launches a backend provides.

Derivations: docs/rms_norm.md, docs/layer_norm.md. A plain backward is the cotangent of the tangents,
``x_t_bar = backward(x; y_t_bar)``, with the output's cotangent in the place of ``b``. ``x`` holds x, weight and bias,
``saved`` rstd and in layer_norm mean. A ``residual`` is added to x first, and the sum is the second output. The
backward kernels find the sum in the place of x, and its cotangent behind that of y: ``g``, that of its tangent ``h``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradmem_kernels.operators.define import define
from gradmem_kernels.operators.rows import mapped_over_rows, parts, stacked

__all__ = ["Backward", "Forward", "LayerNorm", "Norm", "RMSNorm"]

NONE, NEITHER = (None,) * 3, (False,) * 3


class Forward(NamedTuple):
    """What a forward launch reads; of a sum without the tangent of x, that of the residual is in its place."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    x_t: Tensor | None
    weight_t: Tensor | None
    bias_t: Tensor | None
    residual: Tensor | None
    residual_t: Tensor | None
    eps: float
    centred: bool

    @property
    def dual(self) -> bool:
        return any(t is not None for t in (self.x_t, self.weight_t, self.bias_t, self.residual_t))


class Backward(NamedTuple):
    """What a backward launch reads: ``a`` and ``b`` are the cotangents of ``y`` and ``y_t``, ``g`` and ``h`` those of
    the sum and its tangent.
    """

    x: Tensor
    weight: Tensor
    x_t: Tensor | None
    weight_t: Tensor | None
    bias_t: Tensor | None
    rstd: Tensor
    mean: Tensor | None
    a: Tensor | None
    b: Tensor
    g: Tensor | None
    h: Tensor | None


class Norm:
    """The operators ``gradmem::{backend}_norm_forward`` and ``_backward``, and kernels made of them.

    ``launch_forward(tensors: Forward, y, y_t, s, s_t, rstd, mean)`` writes the results that are not ``None``, and
    likewise ``launch_backward(tensors: Backward, dx, dx_t, y_t, dw, dc, dw_t, dc_t)``; ``dc`` only where there is an
    ``a``. Neither is called for tensors without elements.
    """

    def __init__(self, backend: str, launch_forward: Callable[..., None], launch_backward: Callable[..., None]) -> None:
        self._launch_forward, self._launch_backward = launch_forward, launch_backward
        self._forward = define(
            f"{backend}_norm_forward",
            "(Tensor x, Tensor weight, Tensor? bias, Tensor? x_t, Tensor? weight_t, Tensor? bias_t, Tensor? residual, "
            "Tensor? residual_t, float eps, bool centred) -> (Tensor, Tensor, Tensor)", self.run_forward, _new_forward,
            mapped=lambda *args: mapped_over_rows(*args, weights=("weight", "bias", "weight_t", "bias_t")))
        self._backward = define(
            f"{backend}_norm_backward",
            "(Tensor x, Tensor weight, Tensor? x_t, Tensor? weight_t, Tensor? bias_t, Tensor rstd, Tensor? mean, "
            "Tensor? a, Tensor b, Tensor? g, Tensor? h, bool[] needs, bool tangent, bool[] sums) -> "
            "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", self.run_backward, _new_backward,
            mapped=lambda *args: mapped_over_rows(*args, weights=("weight", "weight_t", "bias_t"), sums="sums"))

    def forward(self, x, residual, *, eps, centred):
        y, stats, s = self._forward(*x, *NONE, residual, None, eps, centred)
        return (y,) if residual is None else (y, s), stats.unbind(0)

    def backward(self, x, saved, y_bar, needs):
        return self.dual_backward(x, NONE, saved, (None,), y_bar, NEITHER, needs)[1]

    def dual_forward(self, x, x_t, residual, residual_t, *, eps, centred):
        out, stats, sums = self._forward(*x, *x_t, residual, residual_t, eps, centred)
        y, y_t = zip(out.unbind(0), *(() if residual is None else (sums.unbind(0),)), strict=True)
        return y, y_t, stats.unbind(0)

    def dual_backward(self, x, x_t, saved, y_bar, y_t_bar, needs, needs_t):
        (a, g), (b, h) = ((*bar, None)[:2] for bar in (y_bar, y_t_bar))
        if b is None:
            return (_of_sum(x, g, needs) if a is None else self.backward(x, saved, y_bar, needs),
                    _of_sum(x, h, needs_t))
        out, _, *sums = self._backward(*x[:2], *x_t, *_rstd_mean(saved), a, b, g, h, (needs[0], needs_t[0]), False,
                                       (*needs[1:], *needs_t[1:]))
        dx, dx_t = parts(out, (needs[0], needs_t[0]))
        dw, dc, dw_t, dc_t = (t if need else None for t, need in zip(sums, (*needs[1:], *needs_t[1:]), strict=True))
        return (dx, dw, dc), (dx_t, dw_t, dc_t)

    def double_backward(self, x, x_t, saved, y_bar, needs):
        dx, y_t, dw, dc, *_ = self._backward(*x[:2], *x_t, *_rstd_mean(saved), None, y_bar[0], None, None,
                                             (needs[0], False), True, (*needs[1:], False, False))
        return tuple(t if need else None for t, need in zip((dx, dw, dc), needs, strict=True)), (y_t,)

    def run_forward(self, *arguments):
        out, tensors = _new_forward(*arguments), Forward(*arguments)
        dual, summed = tensors.dual, tensors.residual is not None
        y, y_t = parts(out[0], (True, dual))
        rstd, mean = (*out[1].unbind(0), None)[:2]
        s, s_t = parts(out[2], (summed, summed and dual))
        if tensors.x_t is None:
            tensors = tensors._replace(x_t=tensors.residual_t, residual_t=None)
        if s_t is not None and tensors.x_t is None:
            s_t.zero_()
            s_t = None
        if tensors.x.numel() > 0:
            self._launch_forward(tensors, y, y_t, s, s_t, rstd, mean)
        return out

    def run_backward(self, *arguments):
        out, tensors, (needs, tangent, sums) = _new_backward(*arguments), Backward(*arguments[:11]), arguments[11:]
        dx, dx_t = parts(out[0], needs)
        y_t = out[1] if tangent else None
        if dx is None and y_t is None and not any(sums[:2]):
            tensors = tensors._replace(x_t=None, weight_t=None, a=None)
        tensors = tensors._replace(g=None if dx is None else tensors.g, h=None if dx_t is None else tensors.h)
        totals = [t if wanted else None for t, wanted in zip(out[2:], sums, strict=True)]
        empty = tensors.x.numel() == 0
        for i, total in enumerate(totals):
            # the bias is not in n: its cotangent is that of y
            if total is not None and (empty or (i == 1 and tensors.a is None)):
                total.zero_()
                totals[i] = None
        if not empty:
            self._launch_backward(tensors, dx, dx_t, y_t, *totals)
        return out


class RMSNorm:
    """The kernels of rms_norm, of those of :class:`Norm` without a bias."""

    def __init__(self, norm: Norm) -> None:
        self._norm = norm

    def forward(self, x, aux, *, eps, residual=None):
        return self._norm.forward((*x, None), residual, eps=eps, centred=False)

    def backward(self, x, aux, y, saved, y_bar, needs, *, eps):
        return self._norm.backward((*x, None), saved, y_bar, (*needs, False))[:2]

    def dual_forward(self, x, aux, x_t, *, eps, residual=None, residual_t=None):
        return self._norm.dual_forward((*x, None), (*x_t, None), residual, residual_t, eps=eps, centred=False)

    def dual_backward(self, x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, eps):
        x_bar, x_t_bar = self._norm.dual_backward((*x, None), (*x_t, None), saved, y_bar, y_t_bar, (*needs, False),
                                                  (*needs_t, False))
        return x_bar[:2], x_t_bar[:2]

    def double_backward(self, x, aux, x_t, y, saved, y_bar, needs, *, eps):
        x_bar, y_t = self._norm.double_backward((*x, None), (*x_t, None), saved, y_bar, (*needs, False))
        return x_bar[:2], y_t


class LayerNorm:
    """The kernels of layer_norm, of those of :class:`Norm`."""

    def __init__(self, norm: Norm) -> None:
        self._norm = norm

    def forward(self, x, aux, *, eps, residual=None):
        return self._norm.forward(x, residual, eps=eps, centred=True)

    def backward(self, x, aux, y, saved, y_bar, needs, *, eps):
        return self._norm.backward(x, saved, y_bar, needs)

    def dual_forward(self, x, aux, x_t, *, eps, residual=None, residual_t=None):
        return self._norm.dual_forward(x, x_t, residual, residual_t, eps=eps, centred=True)

    def dual_backward(self, x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, eps):
        return self._norm.dual_backward(x, x_t, saved, y_bar, y_t_bar, needs, needs_t)

    def double_backward(self, x, aux, x_t, y, saved, y_bar, needs, *, eps):
        return self._norm.double_backward(x, x_t, saved, y_bar, needs)


def _of_sum(x, s_bar, needs):
    """The cotangents of x where y has none: that of the sum, in a tensor of its own, and zeros."""
    return tuple(None if not need else s_bar.clone() if i == 0 and s_bar is not None else torch.zeros_like(t)
                 for i, (t, need) in enumerate(zip(x, needs, strict=True)))


def _rstd_mean(saved):
    return (*saved, None)[:2]


def _new_forward(*arguments):
    """``y``, or ``y`` and ``y_t`` in one, ``[1 | 2, ..., 1]``: rstd and in layer_norm mean; and the sum like ``y``.

    Nothing is written; without a residual the sum is empty.
    """
    tensors = Forward(*arguments)
    x, count = tensors.x, 1 + tensors.dual
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (stacked(x, count), x.new_empty(1 + tensors.centred, *x.shape[:-1], 1, dtype=dtype),
            stacked(x, 0 if tensors.residual is None else count))


def _new_backward(*arguments):
    """``dx`` and ``dx_t`` in one, ``y_t``, and ``dw, dc, dw_t, dc_t``, not written; what is not wanted is empty."""
    (x, weight), (needs, tangent, sums) = arguments[:2], arguments[11:]
    return (stacked(x, sum(needs)), stacked(x, int(tangent)),
            *(weight.new_empty(weight.shape if wanted else 0) for wanted in sums))
