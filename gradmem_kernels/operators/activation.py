"""swiglu and gelu on two torch operators, whose launches a backend provides: ``y = f(x) * up``, ``up`` absent in gelu.

Derivations: docs/swiglu.md, docs/gelu.md. A plain backward is the cotangent of the tangents,
``x_t_bar = backward(x; y_t_bar)``, with the output's cotangent in the place of ``b``. The ``form`` of f is ``"silu"``,
``"gelu"`` or ``"gelu_tanh"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gradmem_kernels.operators.define import define
from gradmem_kernels.operators.rows import mapped_over_rows, parts, stacked

__all__ = ["GELU", "Activation", "Backward", "Forward", "SwiGLU"]

NONE, NEITHER = (None, None), (False, False)


class Forward(NamedTuple):
    """What a forward launch reads."""

    x: Tensor
    up: Tensor | None
    x_t: Tensor | None
    up_t: Tensor | None


class Backward(NamedTuple):
    """What a backward launch reads: ``a`` and ``b`` are the cotangents of ``y`` and ``y_t``."""

    x: Tensor
    up: Tensor | None
    x_t: Tensor | None
    up_t: Tensor | None
    a: Tensor | None
    b: Tensor


class Activation:
    """The operators ``gradmem::{backend}_activation_forward`` and ``_backward``, and kernels made of them.

    ``launch_forward(tensors: Forward, results, form)`` writes those of the results ``y, y_t`` that are not ``None``,
    and likewise ``launch_backward(tensors: Backward, results, form)``: ``dx, dx_t, dup, dup_t, y_t``. Neither is called
    for tensors without elements.
    """

    def __init__(self, backend: str, launch_forward: Callable[..., None], launch_backward: Callable[..., None]) -> None:
        self._launch_forward, self._launch_backward = launch_forward, launch_backward
        self._forward = define(
            f"{backend}_activation_forward", "(Tensor x, Tensor? up, Tensor? x_t, Tensor? up_t, str form) -> Tensor",
            self.run_forward, _new_forward, mapped=mapped_over_rows)
        self._backward = define(
            f"{backend}_activation_backward",
            "(Tensor x, Tensor? up, Tensor? x_t, Tensor? up_t, Tensor? a, Tensor b, bool[] needs, bool[] needs_t, "
            "bool tangent, str form) -> (Tensor, Tensor, Tensor)", self.run_backward, _new_backward,
            mapped=mapped_over_rows)

    def forward(self, x, form):
        return self._forward(*x, *NONE, form)

    def backward(self, x, y_bar, needs, form):
        return self.dual_backward(x, NONE, None, y_bar, NEITHER, needs, form)[1]

    def dual_forward(self, x, x_t, form):
        return self._forward(*x, *x_t, form).unbind(0)

    def dual_backward(self, x, x_t, a, b, needs, needs_t, form):
        if b is None:
            zeros = tuple(torch.zeros_like(t) if need else None for t, need in zip(x, needs_t, strict=True))
            return self.backward(x, a, needs, form), zeros
        dx, dup, _ = self._backward(*x, *x_t, a, b, needs, needs_t, False, form)
        (dx, dx_t), (dup, dup_t) = parts(dx, (needs[0], needs_t[0])), parts(dup, (needs[1], needs_t[1]))
        return (dx, dup), (dx_t, dup_t)

    def double_backward(self, x, x_t, b, needs, form):
        dx, dup, y_t = self._backward(*x, *x_t, None, b, needs, NEITHER, True, form)
        return tuple(t if need else None for t, need in zip((dx, dup), needs, strict=True)), y_t

    def run_forward(self, *arguments):
        out, (*tensors, form) = _new_forward(*arguments), arguments
        tensors = Forward(*tensors)
        if tensors.x.numel() > 0:
            self._launch_forward(tensors, parts(out, (True, _dual(tensors))), form)
        return out

    def run_backward(self, *arguments):
        out, tensors = _new_backward(*arguments), Backward(*arguments[:6])
        needs, needs_t, tangent, form = arguments[6:]
        dx, dx_t = parts(out[0], (needs[0], needs_t[0]))
        dup, dup_t = parts(out[1], (needs[1], needs_t[1]))
        if not any(needs) and not tangent:
            tensors = tensors._replace(x_t=None, up_t=None, a=None)
        if tensors.x.numel() > 0:
            self._launch_backward(tensors, (dx, dx_t, dup, dup_t, out[2] if tangent else None), form)
        return out


class SwiGLU:
    """The kernels of swiglu, ``f(x) = x * sigmoid(x)``, of those of :class:`Activation`."""

    FORM = "silu"

    def __init__(self, activation: Activation) -> None:
        self._activation = activation

    def forward(self, x, aux):
        return (self._activation.forward(x, self.FORM),), ()

    def backward(self, x, aux, y, saved, y_bar, needs):
        return self._activation.backward(x, *y_bar, needs, self.FORM)

    def dual_forward(self, x, aux, x_t):
        y, y_t = self._activation.dual_forward(x, x_t, self.FORM)
        return (y,), (y_t,), ()

    def dual_backward(self, x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t):
        return self._activation.dual_backward(x, x_t, *y_bar, *y_t_bar, needs, needs_t, self.FORM)

    def double_backward(self, x, aux, x_t, y, saved, y_bar, needs):
        x_bar, y_t = self._activation.double_backward(x, x_t, *y_bar, needs, self.FORM)
        return x_bar, (y_t,)


class GELU:
    """The kernels of gelu, ``f(x) = x * Phi(x)``, of those of :class:`Activation` without ``up``."""

    FORMS: ClassVar = {"none": "gelu", "tanh": "gelu_tanh"}

    def __init__(self, activation: Activation) -> None:
        self._activation = activation

    def forward(self, x, aux, *, approximate):
        return (self._activation.forward((*x, None), self.FORMS[approximate]),), ()

    def backward(self, x, aux, y, saved, y_bar, needs, *, approximate):
        return self._activation.backward((*x, None), *y_bar, (*needs, False), self.FORMS[approximate])[:1]

    def dual_forward(self, x, aux, x_t, *, approximate):
        y, y_t = self._activation.dual_forward((*x, None), (*x_t, None), self.FORMS[approximate])
        return (y,), (y_t,), ()

    def dual_backward(self, x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, approximate):
        x_bar, x_t_bar = self._activation.dual_backward(
            (*x, None), (*x_t, None), *y_bar, *y_t_bar, (*needs, False), (*needs_t, False), self.FORMS[approximate])
        return x_bar[:1], x_t_bar[:1]

    def double_backward(self, x, aux, x_t, y, saved, y_bar, needs, *, approximate):
        x_bar, y_t = self._activation.double_backward((*x, None), (*x_t, None), *y_bar, (*needs, False),
                                                      self.FORMS[approximate])
        return x_bar[:1], (y_t,)


def _dual(tensors: Sequence[Tensor | None]) -> bool:
    return any(t is not None for t in tensors[2:4])


def _new_forward(*arguments):
    """``y``, or ``y`` and ``y_t`` in one, not written."""
    return stacked(arguments[0], 1 + _dual(arguments))


def _new_backward(*arguments):
    """``dx`` and ``dx_t`` in one, ``dup`` and ``dup_t`` in one, and ``y_t``, not written."""
    x, (needs, needs_t, tangent, _) = arguments[0], arguments[6:]
    return stacked(x, needs[0] + needs_t[0]), stacked(x, needs[1] + needs_t[1]), stacked(x, int(tangent))
