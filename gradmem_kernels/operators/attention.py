"""Attention on two torch operators, whose launches a backend provides. Formulas: docs/attention.md.

A plain backward is the cotangent of the tangents, ``x_t_bar = backward(x; y_t_bar)``, with the output's cotangent in
the place of ``b``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmem_kernels.operators.define import define, like
from gradmem_kernels.operators.rows import parts
from gradmem_kernels.reference.visible import Settings

__all__ = ["Attention", "Backward", "Forward", "Settings", "packed_rows"]

_AUX = "Tensor? seqlens, Tensor? cu_seqlens, Tensor? cu_seqlens_k, Tensor? mask, Tensor? bias"
_OPTIONS = ("bool causal, float scale, int? window, float? softcap, float dropout, int seed, int[]? grad_rows, "
            "int[]? tangent_rows")
_SHARED, _BROADCAST = ("cu_seqlens", "cu_seqlens_k"), ("mask", "bias")


class Forward(NamedTuple):
    """What a forward launch reads; with ``o`` and ``lse`` given, they are known, and the tangents alone are wanted."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_t: Tensor | None
    k_t: Tensor | None
    v_t: Tensor | None
    o: Tensor | None
    lse: Tensor | None

    @property
    def dual(self) -> bool:
        return any(t is not None for t in self[3:6])


class Backward(NamedTuple):
    """What a backward launch reads: ``a`` and ``b`` are the cotangents of ``o`` and ``o_t``."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_t: Tensor | None
    k_t: Tensor | None
    v_t: Tensor | None
    o: Tensor
    o_t: Tensor | None
    lse: Tensor
    mu: Tensor | None
    a: Tensor | None
    b: Tensor
    needs: tuple[bool, ...]
    needs_t: tuple[bool, ...]

    def without_tangents(self) -> Backward:
        """What matters where no cotangent of q, k and v is wanted."""
        return self._replace(q_t=None, k_t=None, v_t=None, o_t=None, mu=None, a=None)


class Attention:
    """The four kernels on the operators ``gradmem::{backend}_attention_forward`` and ``_backward``.

    ``launch_forward(tensors: Forward, settings: Settings, o, o_t, lse, mu)`` writes the results that are not ``None``,
    and likewise ``launch_backward(tensors: Backward, settings, dq, dk, dv, dq_t, dk_t, dv_t)``. Results outside
    ``grad_rows``, or ``tangent_rows`` for those of tangents, are zeros already.
    """

    def __init__(self, backend: str, launch_forward: Callable[..., None], launch_backward: Callable[..., None]) -> None:
        self._launch_forward, self._launch_backward = launch_forward, launch_backward
        self._forward = define(
            f"{backend}_attention_forward",
            "(Tensor q, Tensor k, Tensor v, Tensor? q_t, Tensor? k_t, Tensor? v_t, Tensor? o, Tensor? lse, "
            f"{_AUX}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
            self._run_forward, _new_forward, _SHARED, _BROADCAST, ranks=(4, 3, 3))
        self._backward = define(
            f"{backend}_attention_backward",
            "(Tensor q, Tensor k, Tensor v, Tensor? q_t, Tensor? k_t, Tensor? v_t, Tensor o, Tensor? o_t, Tensor lse, "
            f"Tensor? mu, Tensor? a, Tensor b, bool[] needs, bool[] needs_t, {_AUX}, {_OPTIONS}) -> "
            "(Tensor, Tensor, Tensor)",
            self._run_backward, _new_backward, _SHARED, _BROADCAST, ranks=(4, 4, 4))

    def forward(self, x, aux, **options):
        o, lse, _ = self._forward(*x, *(None,) * 5, *aux, *_values(options))
        return (o,), (lse,)

    def backward(self, x, aux, y, saved, y_bar, needs, **options):
        options = {**options, "tangent_rows": options["grad_rows"]}
        return self._cotangents(*x, *(None,) * 3, *y, None, *saved, None, None, *y_bar, (False,) * 3, needs, *aux,
                                *_values(options))[1]

    def dual_forward(self, x, aux, x_t, **options):
        o, lse, mu = self._forward(*x, *x_t, None, None, *aux, *_values(options))
        return (o[0],), (o[1],), (lse, mu)

    def dual_backward(self, x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, **options):
        (a,), (b,) = y_bar, y_t_bar
        if b is None:
            zeros = tuple(torch.zeros_like(t) if need else None for t, need in zip(x, needs_t, strict=True))
            return self.backward(x, aux, y, saved[:1], y_bar, needs, **options), zeros
        return self._cotangents(*x, *x_t, *y, *y_t, *saved, a, b, needs, needs_t, *aux, *_values(options))

    def double_backward(self, x, aux, x_t, y, saved, y_bar, needs, **options):
        o_t, _, mu = self._forward(*x, *x_t, *y, *saved, *aux, *_values(options))
        if not any(needs):
            return (None,) * 3, (o_t,)
        x_bar, _ = self._cotangents(*x, *x_t, *y, o_t, *saved, mu, None, *y_bar, needs, (False,) * 3, *aux,
                                    *_values(options))
        return x_bar, (o_t,)

    def _cotangents(self, *arguments):
        """Those of x and of x_t, from the arguments of the operator."""
        return tuple(zip(*map(parts, self._backward(*arguments), _wanted(*arguments)), strict=True))

    def _run_forward(self, *arguments):
        out, tensors, settings = _new_forward(*arguments), Forward(*arguments[:8]), Settings(*arguments[8:])
        o, o_t = parts(out[0], (tensors.o is None, tensors.dual))
        self._launch_forward(tensors, settings, o, o_t, None if o is None else out[1], out[2] if tensors.dual else None)
        return out

    def _run_backward(self, *arguments):
        out, tensors, settings = _new_backward(*arguments), Backward(*arguments[:14]), Settings(*arguments[14:])
        d_x, d_x_t = zip(*map(parts, out, _wanted(*arguments)), strict=True)
        for group, rows in ((d_x, settings.grad_rows), (d_x_t, settings.tangent_rows)):
            for t in group if rows is not None else ():
                if t is not None:
                    t.zero_()
        self._launch_backward(tensors if any(tensors.needs) else tensors.without_tangents(), settings, *d_x, *d_x_t)
        return out


def packed_rows(own: Tensor | None, other: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor | None:
    """For each row of packed sequences the interval of the other side's rows that its sequence has, and the distance
    from a row to its position there: ``[3, rows]``.
    """
    if own is None or other is None:
        return None
    # one more sequence, without rows, so that there is one
    own, other = (torch.cat([cu, cu[-1:]]).to(dtype) for cu in (own, other))
    row = torch.arange(rows, dtype=dtype, device=own.device)
    sequence = (torch.searchsorted(own, row, right=True) - 1).clamp(0, own.shape[0] - 2)
    start, end = other[sequence], other[sequence + 1]
    return torch.stack((start, torch.where(row < own[-1], end, start), end - own[sequence + 1]))


def _values(options: Mapping[str, Any]) -> list[Any]:
    """The options in the order of :data:`_OPTIONS`."""
    return [options[name] for name in Settings._fields[5:]]


def _new_forward(*arguments):
    """``o`` and ``o_t``, stacked if it is both, ``lse``, ``mu``, not written; without elements what is known, or not
    asked for.
    """
    q, dual, known = arguments[0], Forward(*arguments[:8]).dual, arguments[6] is not None
    rows = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return like(q, dual + (not known)), q.new_empty(0) if known else rows, rows.new_empty(rows.shape if dual else 0)


def _new_backward(*arguments):
    """``dq, dk, dv``, stacked with ``dq_t, dk_t, dv_t``, not written; without elements what is not needed."""
    return tuple(like(t, sum(wanted)) if any(wanted) else t.new_empty(0)
                 for t, wanted in zip(arguments[:3], _wanted(*arguments), strict=True))


def _wanted(*arguments):
    """``(need, need_t)`` of q, k and v, from the arguments of the operator."""
    return tuple(zip(*arguments[12:14], strict=True))
