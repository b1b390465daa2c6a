"""Four kernels -> autograd functions of every kind (docs/autograd.md).

An op ``y = f(x)`` is given by four kernels (:class:`Kernels`). This module is the only place that turns them into
first-order, double-backward, forward-mode and dual autograd functions; no op has autograd code of its own.

===============================  ===========================================================================
what torch asks for              what runs
===============================  ===========================================================================
``f(x)``                         ``forward``
its backward                     ``backward``
the backward's backward, ``g``   ``dual_forward(x, x_t=g)``, ``dual_backward(x, x_t=g, y_bar=None, y_t_bar=y_bar)``
forward mode of ``f``            ``dual_forward``
forward mode of the backward     ``dual_forward``, ``dual_backward(x, x_t, y_bar=tangent of y_bar, y_t_bar=y_bar)``
``f_dual(x, x_t)``               ``dual_forward``, and ``dual_backward`` as its backward
===============================  ===========================================================================

A further derivative raises :class:`gradmem_kernels.HigherOrderError`, naming the op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from gradmem_kernels.derivatives import (
    Flags,
    Function,
    Tensors,
    in_own_dtype,
    last_derivative,
    needed,
    note_inputs,
    refuse,
    will_run,
)
from gradmem_kernels.ranges import named_range

__all__ = ["Flags", "Kernels", "Op", "Tensors"]


class Kernels(Protocol):
    """What a backend module provides for one op.

    ``x`` holds every differentiable input, ``aux`` the other tensors, ``y`` the outputs, ``saved`` what the backward
    kernels want kept beside them. A suffix ``_t`` marks tangents, ``_bar`` cotangents; ``None`` is a known zero.
    ``needs`` (``needs_t``) says for which inputs (input tangents) a cotangent is wanted; the others come back as
    ``None``. It holds that::

        x_t_bar = backward(x; y_t_bar)
        x_bar   = backward(x; y_bar) + d/de backward(x + e * x_t; y_t_bar)
    """

    def forward(self, x: Tensors, aux: Tensors, **options: Any) -> tuple[Tensors, Tensors]:
        """Returns ``y, saved``."""

    def backward(self, x: Tensors, aux: Tensors, y: Tensors, saved: Tensors, y_bar: Tensors, needs: Flags,
                 **options: Any) -> Tensors:
        """Returns ``x_bar``."""

    def dual_forward(self, x: Tensors, aux: Tensors, x_t: Tensors, **options: Any) -> tuple[Tensors, Tensors, Tensors]:
        """Returns ``y, y_t, saved``; at least one tangent is given."""

    def dual_backward(self, x: Tensors, aux: Tensors, x_t: Tensors, y: Tensors, y_t: Tensors, saved: Tensors,
                      y_bar: Tensors, y_t_bar: Tensors, needs: Flags, needs_t: Flags,
                      **options: Any) -> tuple[Tensors, Tensors]:
        """Returns ``x_bar, x_t_bar``."""

    # Kernels of an op that is called with early= (see Op) take it as an option: of forward and backward, flags of the
    # inputs; of the dual pair, flags of the inputs and of their tangents. The forward kernel computes the cotangents
    # of those already and ends saved with them. The option is absent where saved has none.

    # Kernels of an op with an addend (see Op) take it as an option of forward, and with its tangent of dual_forward,
    # and end y, and y_t, with the sum. The others find the sum in the place of the first input, and the cotangents of
    # the sum at the end of y_bar and y_t_bar; they add these to what they return for it.

    # A backend may also have double_backward(x, aux, x_t, y, saved, y_bar, needs, **options) -> x_bar, y_t, which
    # shares the work of the pair that otherwise serves the double backward; see _double_backward.


def _keep_all(x: Tensors, options: Mapping[str, Any]) -> Flags:
    return (True,) * len(x)


@dataclass(frozen=True, eq=False)
class Op:
    """The shape of an op: the names of its tensors, and what its backward kernels read.

    ``keeps_x(x, options)`` tells which inputs the backward kernels read, ``keeps_y`` whether they read the outputs:
    what they do not read is not kept alive.

    An ``addend`` is added to the first input, and the sum is the last output: ``y, s = f(x + addend)``. The sum is kept
    in the place of both, and its cotangent is that of both.

    A call with ``early`` flags has the forward kernel compute cotangents of these inputs (and, of the dual op, then
    their tangents) already, where that spares the backward kernel more work. They serve the first derivative alone.
    """

    name: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    aux: tuple[str, ...] = ()
    keeps_x: Callable[[Tensors, Mapping[str, Any]], Flags] = _keep_all
    keeps_y: bool = False
    addend: str = ""

    @torch.compiler.disable
    def __call__(self, kernels: Kernels, x: Tensors, aux: Tensors = (), *, addend: Tensors = (), early: Flags = (),
                 **options: Any) -> tuple[Tensor, ...]:
        """The outputs ``y``, differentiable twice in every entry of ``x`` and in the addend."""
        with named_range(self.name):
            return _Forward.apply(_Call(self, kernels, options, early=early), *addend, *x, *aux)[: len(self.y)]

    @torch.compiler.disable
    def dual(self, kernels: Kernels, x: Tensors, x_t: Tensors, aux: Tensors = (), *, addend: Tensors = (),
             early: Flags = (), **options: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The outputs and their tangents along ``x_t``, differentiable once in ``x`` and ``x_t``.

        ``addend`` has the addend and its tangent, where the op has one.
        """
        if all(t is None for t in (*addend[1:], *x_t)):
            y = self(kernels, x, aux, addend=addend[:1], early=early[: len(x)], **options)
            return y, tuple(torch.zeros_like(o) for o in y)
        with named_range(f"{self.name}_dual"):
            out = _DualForward.apply(_Call(self, kernels, options, early=early), *addend, *x, *x_t, *aux)
        n = len(self.y)
        return out[:n], out[n : 2 * n]

    @property
    def addends(self) -> int:
        """How many there are, 0 or 1."""
        return int(self.addend != "")

    def of_sum(self, x: Tensors, total: Tensor | None) -> Tensors:
        """``x`` with the sum in the place of the first input."""
        return (total, *x[1:]) if self.addend else x

    def needs(self, flags: Flags) -> Flags:
        """Of the addend and ``x``: which of them need a cotangent, the sum where one of its terms does."""
        return (flags[0] or flags[1], *flags[2:]) if self.addend else flags

    def spread(self, x_bar: Tensors, flags: Flags) -> Tensors:
        """The cotangents of the addend and ``x`` that ``flags`` asks for: the sum's is that of both its terms."""
        terms = (x_bar[0], *x_bar) if self.addend else x_bar
        return tuple(t if flag else None for t, flag in zip(terms, flags, strict=True))


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of an op: everything about it that is not a tensor."""

    op: Op
    kernels: Kernels
    options: Mapping[str, Any]
    needs: Flags = ()  # of a backward: the inputs that need a cotangent
    early: Flags = ()  # those whose cotangents the forward kernel computes

    def run(self, kernel: str, *args: Any, addend: Tensors = (), early: Flags = ()) -> Any:
        """The result of one of the kernels."""
        options = {**self.options, "early": early} if any(early) else self.options
        if addend:
            options = {**options, **dict(zip((self.op.addend, f"{self.op.addend}_t"), addend, strict=False))}
        with named_range(self.op.name, kernel):
            return getattr(self.kernels, kernel)(*args, **options)

    def kept(self, x: Tensors, y: Tensors) -> tuple[Tensors, Tensors]:
        flags = self.op.keeps_x(x, self.options)
        x = self.op.of_sum(x, y[-1])
        return (tuple(t if keep else None for t, keep in zip(x, flags, strict=True)),
                y if self.op.keeps_y else (None,) * len(y))


def _split(flat: Sequence[Any], *counts: int) -> list[tuple[Any, ...]]:
    """Cuts ``flat`` into tuples of these lengths and one more with the rest."""
    parts, start = [], 0
    for count in counts:
        parts.append(tuple(flat[start : start + count]))
        start += count
    parts.append(tuple(flat[start:]))
    return parts


def _select(values: Sequence[Any], flags: Flags) -> tuple[Any, ...]:
    return tuple(value for value, flag in zip(values, flags, strict=True) if flag)


def _scatter(values: Sequence[Any], flags: Flags) -> tuple[Any, ...]:
    """The inverse of :func:`_select`, with ``None`` for what it left out."""
    rest = iter(values)
    return tuple(next(rest) if flag else None for flag in flags)


def _terms_wanted(ctx: Any) -> bool:
    """Of a sum that is the first input, and an output of the op: whether a term's cotangent will be used."""
    forward, _ = ctx.next_functions[0]
    return any(node is not None and will_run(node) for node, _ in forward.next_functions[:2])


class _Forward(Function):
    """``apply(call, *addend, *x, *aux) -> (*y, *saved)``."""

    generate_vmap_rule = True

    @staticmethod
    @in_own_dtype
    def forward(call: _Call, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        addend, x, aux = _split(flat, call.op.addends, len(call.op.x))
        y, saved = call.run("forward", x, aux, addend=addend, early=call.early)
        return (*y, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *flat = inputs
        _, x, aux = _split(flat, call.op.addends, len(call.op.x))
        y, saved = _split(output, len(call.op.y))
        note_inputs(ctx, inputs)
        ctx.call, ctx.n_saved = call, len(saved)
        ctx.mark_non_differentiable(*saved)
        x, y = call.kept(x, y)
        ctx.save_for_backward(*x, *aux, *y, *saved)
        ctx.save_for_forward(*flat)

    @staticmethod
    def backward(ctx: Any, *y_bar: Tensor | None) -> tuple[Tensor | None, ...]:
        call, op = ctx.call, ctx.call.op
        y_bar = y_bar[: len(op.y)]
        wanted = needed(ctx)[1 : 1 + op.addends + len(op.x)]
        needs = op.needs(wanted)
        if all(g is None for g in y_bar) or not any(needs):
            return (None,) * (1 + op.addends + len(op.x) + len(op.aux))
        if op.addend and all(g is None for g in y_bar[:-1]):
            x_bar: Tensors = (y_bar[-1], *(None,) * (len(op.x) - 1))  # the sum's own, passed on
        else:
            x_bar = _scatter(_Backward.apply(replace(call, needs=needs), *ctx.saved_tensors, *y_bar), needs)
        return None, *op.spread(x_bar, wanted), *(None,) * len(op.aux)

    @staticmethod
    def jvp(ctx: Any, _: None, *flat_t: Tensor | None) -> tuple[Tensor | None, ...]:
        call, op = ctx.call, ctx.call.op
        addend, x, aux = _split(ctx.saved_tensors, op.addends, len(op.x))
        addend_t, x_t, _aux_t = _split(flat_t, op.addends, len(op.x))
        out = _DualForward.apply(replace(call, early=()), *addend, *addend_t, *x, *x_t, *aux)
        n = len(op.y)
        return (*out[n : 2 * n], *(None,) * ctx.n_saved)


class _Backward(Function):
    """``apply(call, *x, *aux, *y, *saved, *y_bar) -> x_bar`` of the inputs in ``call.needs``.

    As a function it depends on ``x`` and ``y_bar``; ``y`` and ``saved`` only spare it their recomputation.
    """

    generate_vmap_rule = True

    @staticmethod
    def _parts(op: Op, flat: Sequence[Any]) -> list[tuple[Any, ...]]:
        """``x, aux, y, saved, y_bar`` of the flat arguments."""
        n_x, n_aux, n_y = len(op.x), len(op.aux), len(op.y)
        return _split(flat, n_x, n_aux, n_y, len(flat) - n_x - n_aux - 2 * n_y)

    @staticmethod
    @in_own_dtype
    def forward(call: _Call, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        x, aux, y, saved, y_bar = _Backward._parts(call.op, flat)
        return _select(call.run("backward", x, aux, y, saved, y_bar, call.needs, early=call.early), call.needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        note_inputs(ctx, inputs)
        ctx.call, *flat = inputs
        if ctx.call.op.addend:
            flat[-1] = None  # the sum's cotangent was added to the result: no derivative depends on it
        ctx.save_for_backward(*flat)
        ctx.save_for_forward(*flat)

    @staticmethod
    def backward(ctx: Any, *g: Tensor | None) -> tuple[Tensor | None, ...]:
        call, op = ctx.call, ctx.call.op
        x_t = _scatter(g, call.needs)
        x_needs, aux_needs, y_needs, saved_needs, y_bar_needs = _Backward._parts(op, needed(ctx)[1:])
        s_bar_bar: Tensors = ()
        if op.addend:  # the sum's cotangent was added to the result, so that the result's goes back to it
            x_needs = (x_needs[0] and _terms_wanted(ctx), *x_needs[1:])
            y_bar_needs, s_bar_bar = y_bar_needs[:-1], (x_t[0] if y_bar_needs[-1] else None,)

        @in_own_dtype
        def compute(*tensors: Tensor | None) -> Tensors:
            x_t, flat = _split(tensors, len(op.x))
            x, aux, y, saved, y_bar = _Backward._parts(op, flat)
            x_bar, y_t = _double_backward(call, x, aux, x_t, y, saved, y_bar, x_needs)
            return (*_select(x_bar, x_needs), *_select(y_t, y_bar_needs))

        x_bar: Tensors = (None,) * len(x_needs)
        y_bar_bar: Tensors = (None,) * len(y_bar_needs)
        if any(t is not None for t in g) and any(x_needs + y_bar_needs):
            out = last_derivative(op.name, compute, *x_t, *ctx.saved_tensors)
            some_x_bar, some_y_bar_bar = _split(out, sum(x_needs))
            x_bar, y_bar_bar = _scatter(some_x_bar, x_needs), _scatter(some_y_bar_bar, y_bar_needs)
        return (None, *x_bar, *(None,) * len(aux_needs + y_needs + saved_needs), *y_bar_bar, *s_bar_bar)

    @staticmethod
    def jvp(ctx: Any, _: None, *flat_t: Tensor | None) -> tuple[Tensor | None, ...]:
        call, op, needs = ctx.call, ctx.call.op, ctx.call.needs
        x_t, *_rest, y_bar_t = _Backward._parts(op, flat_t)
        n_x, n_aux, n_y = len(op.x), len(op.aux), len(op.y)

        @in_own_dtype
        def compute(*tensors: Tensor | None) -> Tensors:
            x, aux, y, saved, y_bar, y_bar_t, x_t = _split(
                tensors, n_x, n_aux, n_y, len(tensors) - 2 * n_x - n_aux - 3 * n_y, n_y, n_y)
            if all(t is None for t in x_t):
                return _select(call.run("backward", x, aux, y, saved, y_bar_t, needs), needs)
            y, y_t, saved = call.run("dual_forward", x, aux, x_t)
            x_bar, _ = call.run("dual_backward", x, aux, x_t, y, y_t, saved, y_bar_t, y_bar, needs,
                                (False,) * n_x)
            return _select(x_bar, needs)

        return last_derivative(op.name, compute, *ctx.saved_tensors, *y_bar_t, *x_t)


def _double_backward(call: _Call, x: Tensors, aux: Tensors, x_t: Tensors, y: Tensors, saved: Tensors, y_bar: Tensors,
                     needs: Flags) -> tuple[Tensors, Tensors]:
    """``d/de backward(x + e * x_t; y_bar)`` and ``y_t``."""
    if hasattr(call.kernels, "double_backward"):
        return call.run("double_backward", x, aux, x_t, y, saved, y_bar, needs)
    with named_range(call.op.name, "double_backward"):
        y, y_t, saved = call.run("dual_forward", x, aux, x_t)
        if not any(needs):
            return (None,) * len(x), y_t
        x_bar, _ = call.run("dual_backward", x, aux, x_t, y, y_t, saved, (None,) * len(y), y_bar, needs,
                            (False,) * len(x))
        return x_bar, y_t


class _DualForward(Function):
    """``apply(call, *addend, *addend_t, *x, *x_t, *aux) -> (*y, *y_t, *saved)``."""

    generate_vmap_rule = True

    @staticmethod
    @in_own_dtype
    def forward(call: _Call, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        addend, x, x_t, aux = _split(flat, 2 * call.op.addends, len(call.op.x), len(call.op.x))
        y, y_t, saved = call.run("dual_forward", x, aux, x_t, addend=addend, early=call.early)
        return (*y, *y_t, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *flat = inputs
        op = call.op
        addend, x, x_t, aux = _split(flat, 2 * op.addends, len(op.x), len(op.x))
        y, y_t, saved = _split(output, len(op.y), len(op.y))
        note_inputs(ctx, inputs)
        ctx.call = call
        ctx.mark_non_differentiable(*saved)
        x, y = call.kept(x, y)
        if x_t[0] is not None or any(t is not None for t in addend[1:]):
            x_t = op.of_sum(x_t, y_t[-1])
        ctx.save_for_backward(*x, *aux, *x_t, *y, *(y_t if op.keeps_y else (None,) * len(op.y)), *saved)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        call, op = ctx.call, ctx.call.op
        n_x, n_aux, n_y = len(op.x), len(op.aux), len(op.y)
        addend, x, x_t, _ = _split(needed(ctx)[1:], 2 * op.addends, n_x, n_x)
        wanted, wanted_t = (*addend[:1], *x), (*addend[1:], *x_t)
        needs, needs_t = op.needs(wanted), op.needs(wanted_t)
        bars = bars[: 2 * n_y]
        if all(g is None for g in bars) or not any(needs + needs_t):
            return (None,) * (1 + 2 * op.addends + 2 * n_x + n_aux)

        @in_own_dtype
        def compute(*tensors: Tensor | None) -> Tensors:
            y_bar, y_t_bar, x, aux, x_t, y, y_t, saved = _split(tensors, n_y, n_y, n_x, n_aux, n_x, n_y, n_y)
            x_bar, x_t_bar = call.run("dual_backward", x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t,
                                      early=call.early)
            return (*_select(x_bar, needs), *_select(x_t_bar, needs_t))

        out = last_derivative(f"{op.name}_dual", compute, *bars, *ctx.saved_tensors)
        x_bar, x_t_bar = _split(out, sum(needs))
        x_bar, x_t_bar = op.spread(_scatter(x_bar, needs), wanted), op.spread(_scatter(x_t_bar, needs_t), wanted_t)
        n = op.addends
        return None, *x_bar[:n], *x_t_bar[:n], *x_bar[n:], *x_t_bar[n:], *(None,) * n_aux

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> NoReturn:
        refuse(f"{ctx.call.op.name}_dual, forward mode over forward mode")
