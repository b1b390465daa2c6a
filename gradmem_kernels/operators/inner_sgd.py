"""inner_sgd on two torch operators, whose launches a backend provides. Derivation and names: docs/inner_sgd.md.

Operators have tensors ``[B, N]``. A tensor lr becomes the ``rate``, ``[B, N]``, or ``[B, 1]`` where each sample has one
number, of the dtype that is computed with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gradmem_kernels.operators.define import define, rows_dense

__all__ = ["Backward", "Forward", "InnerSGD", "Settings"]

T = TypeVar("T", "Forward", "Backward")
NONE, NEITHER = (None,) * 3, (False,) * 3
_SETTINGS = "float lr, float? clip_value, float? clip_norm"


class Settings(NamedTuple):
    """``lr`` counts where there is no rate."""

    lr: float
    clip_value: float | None
    clip_norm: float | None


class Forward(NamedTuple):
    """What a forward launch reads."""

    memory: Tensor | None
    grad: Tensor | None
    rate: Tensor | None
    memory_t: Tensor | None
    grad_t: Tensor | None
    rate_t: Tensor | None


class Backward(NamedTuple):
    """What a backward launch reads: ``a`` and ``b`` are the cotangents of ``y`` and ``y_t``."""

    grad: Tensor | None
    rate: Tensor | None
    grad_t: Tensor | None
    rate_t: Tensor | None
    a: Tensor | None
    b: Tensor | None


class InnerSGD:
    """The four kernels on the operators ``gradmem::{backend}_inner_sgd_forward`` and ``_backward``.

    ``launch_forward(tensors: Forward, settings: Settings, y, y_t)`` writes the results that are not ``None``, and
    likewise ``launch_backward(tensors: Backward, settings, dg, dr, dg_t, dr_t)``. Tensors are contiguous, but for the
    rates, of which the rows are. Neither is called for tensors without elements.
    """

    def __init__(self, backend: str, launch_forward: Callable[..., None], launch_backward: Callable[..., None]) -> None:
        self._launch_forward, self._launch_backward = launch_forward, launch_backward
        self._forward = define(
            f"{backend}_inner_sgd_forward",
            "(Tensor? memory, Tensor? grad, Tensor? rate, Tensor? memory_t, Tensor? grad_t, Tensor? rate_t, "
            f"{_SETTINGS}) -> (Tensor, Tensor)", self.run_forward, _new_forward, ranks=(2, 2))
        self._backward = define(
            f"{backend}_inner_sgd_backward",
            "(Tensor? grad, Tensor? rate, Tensor? grad_t, Tensor? rate_t, Tensor? a, Tensor? b, "
            f"bool[] needs, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)", self.run_backward, _new_backward,
            ranks=(2, 2, 2, 2))

    def forward(self, x, aux, **options):
        y, _, saved = self.dual_forward(x, aux, NONE, **options)
        return y, saved

    def backward(self, x, aux, y, saved, y_bar, needs, **options):
        x_bar, _ = self.dual_backward(x, aux, NONE, y, (None,), saved, y_bar, (None,), needs, NEITHER, **options)
        return x_bar

    def dual_forward(self, x, aux, x_t, *, lr, clip_value, clip_norm):
        like = next(t for t in (*x[:2], *x_t[:2]) if t is not None)
        y, y_t = self._forward(*_rows(x, like), *_rows(x_t, like), lr or 0.0, clip_value, clip_norm)
        return ((None if x[0] is None else y.view(like.shape),),
                (None if all(t is None for t in x_t) else y_t.view(like.shape),), ())

    def dual_backward(self, x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, lr, clip_value, clip_norm):
        bars = *y_bar, *y_t_bar
        like = next(t for t in bars if t is not None)
        flags, found = (*needs[1:], *needs_t[1:]), (*NONE, None)
        if any(flags):
            _, grad, rate = _rows(x, like)
            _, grad_t, rate_t = _rows(x_t, like)
            found = self._backward(grad, rate, grad_t, rate_t, *_rows((*bars, None), like)[:2], flags, lr or 0.0,
                                   clip_value, clip_norm)
        dg, dr, dg_t, dr_t = (t if flag else None for t, flag in zip(found, flags, strict=True))
        dm, dm_t = (None if not need else torch.zeros_like(like) if bar is None else bar.clone()
                    for need, bar in zip((needs[0], needs_t[0]), bars, strict=True))
        return ((dm, None if dg is None else dg.view(like.shape), _reduced(dr, x[2], like)),
                (dm_t, None if dg_t is None else dg_t.view(like.shape), _reduced(dr_t, x[2], like)))

    def run_forward(self, *arguments):
        out, tensors = _new_forward(*arguments), _dense(Forward(*arguments[:6]))
        y, y_t = (t if wanted else None for t, wanted in zip(out, _wanted(tensors), strict=True))
        if any(t.numel() > 0 for t in out):
            self._launch_forward(tensors, Settings(*arguments[6:]), y, y_t)
        return out

    def run_backward(self, *arguments):
        out, tensors, needs = _new_backward(*arguments), _dense(Backward(*arguments[:6])), arguments[6]
        results = [t if need else None for t, need in zip(out, needs, strict=True)]
        if any(t is not None and t.numel() > 0 for t in tensors[4:]):
            self._launch_backward(tensors, Settings(*arguments[7:]), *results)
        else:
            for t in results:
                if t is not None:
                    t.zero_()
        return out


def _rows(x, like):
    """Memory, gradient and rate, or their tangents, as operators take them; ``like`` has the memory's shape."""
    size, width = like.shape[0], like.shape[1:].numel()
    *states, rate = x
    states = [None if t is None else t.reshape(size, width).contiguous() for t in states]
    if rate is not None:
        rate = rate.to(torch.promote_types(like.dtype, torch.float32))
        if rate.numel() == 1 or (rate.dim() == like.dim() and rate.shape[1:].numel() == 1):
            rate = rate.expand(size, *(1,) * (like.dim() - 1)).reshape(size, 1)
        elif rate.dim() == like.dim() and rate.shape[0] != 1:
            rate = rate.expand(like.shape).reshape(size, width).contiguous()
        else:
            rate = rate.expand(1, *like.shape[1:]).reshape(1, width).contiguous().expand(size, width)
    return *states, rate


def _dense(tensors: T) -> T:
    """As a launch reads them. vmap folds a tensor that it does not map over a batch of 1 into a view that is not."""
    return tensors._replace(**{name: rows_dense(t) if name.startswith("rate") else t.contiguous()
                               for name, t in tensors._asdict().items() if t is not None})


def _reduced(terms, rate, like):
    """The sum of ``terms``, ``[B, N]`` or ``[B, 1]``, over what ``rate`` was broadcast along."""
    if terms is None:
        return None
    shape = like.shape if terms.shape[1] != 1 else (like.shape[0], *(1,) * (like.dim() - 1))
    return terms.view(shape).sum_to_size(rate.shape).to(rate.dtype)


def _wanted(tensors: Forward) -> tuple[bool, bool]:
    return tensors.memory is not None, any(t is not None for t in tensors[3:])


def _new_forward(*arguments):
    """``y`` and ``y_t``, not written; without elements what is not wanted."""
    tensors = Forward(*arguments[:6])
    like = next(t for t in (*tensors[:2], *tensors[3:5]) if t is not None)
    return tuple(like.new_empty(like.shape if wanted else 0) for wanted in _wanted(tensors))


def _new_backward(*arguments):
    """``dg, dr, dg_t, dr_t``, not written; without elements what is not needed."""
    tensors, needs = Backward(*arguments[:6]), arguments[6]
    like = next(t for t in tensors[4:] if t is not None)
    both = like, like if tensors.rate is None else tensors.rate
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip(both * 2, needs, strict=True))
