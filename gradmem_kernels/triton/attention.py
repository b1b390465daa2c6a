"""Attention on Triton: the kernels' contract, and their launch as torch operators. Derivation: docs/attention.md.

Two operators serve all orders. A plain backward is the cotangent of the tangents, ``x_t_bar = backward(x; y_t_bar)``,
with the output's cotangent in the place of ``b``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from gradmem_kernels.triton import attention_kernels as kernels
from gradmem_kernels.triton.attention_configs import HEAD_DIMS, Config, choose, dtype_class
from gradmem_kernels.triton.attention_tiles import STATS
from gradmem_kernels.triton.common import (
    accumulator,
    architecture,
    define,
    dot_precision,
    like,
    on_device,
    one_layout,
    rows_dense,
    strides,
)
from gradmem_kernels.triton.common import refusal as refusal_of
from gradmem_kernels.triton.rows import parts

_AUX = "Tensor? seqlens, Tensor? cu_seqlens, Tensor? cu_seqlens_k, Tensor? mask, Tensor? bias"
_OPTIONS = ("bool causal, float scale, int? window, float? softcap, float dropout, int seed, int[]? grad_rows, "
            "int[]? tangent_rows")
#: Rows of a program of row_statistics_kernel.
_STATISTICS_ROWS = 32


def refusal(q: Tensor | None = None, *_: Tensor | None) -> str | None:
    """Why these kernels cannot serve such tensors; ``None`` if they can."""
    reason = refusal_of(q)
    if q is None or reason is not None:
        return reason
    if q.shape[-1] > HEAD_DIMS[-1]:
        return f"head dimension {q.shape[-1]}; the Triton kernels take at most {HEAD_DIMS[-1]}"
    return None


def forward(x, aux, **options):
    o, lse, _ = _forward(*x, None, None, None, None, None, *aux, *_values(options))
    return (o,), (lse,)


def backward(x, aux, y, saved, y_bar, needs, **options):
    options = {**options, "tangent_rows": options["grad_rows"]}
    return _cotangents(*x, None, None, None, *y, None, *saved, None, None, *y_bar, *aux, (False,) * 3, needs,
                       *_values(options))[1]


def dual_forward(x, aux, x_t, **options):
    o, lse, mu = _forward(*x, *x_t, None, None, *aux, *_values(options))
    return (o[0],), (o[1],), (lse, mu)


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, **options):
    (a,), (b,) = y_bar, y_t_bar
    if b is None:
        zeros = tuple(torch.zeros_like(t) if need else None for t, need in zip(x, needs_t, strict=True))
        return backward(x, aux, y, saved[:1], y_bar, needs, **options), zeros
    return _cotangents(*x, *x_t, *y, *y_t, *saved, a, b, *aux, needs, needs_t, *_values(options))


def double_backward(x, aux, x_t, y, saved, y_bar, needs, **options):
    o_t, _, mu = _forward(*x, *x_t, *y, *saved, *aux, *_values(options))
    if not any(needs):
        return (None,) * 3, (o_t,)
    x_bar, _ = _cotangents(*x, *x_t, *y, o_t, *saved, mu, None, *y_bar, *aux, needs, (False,) * 3, *_values(options))
    return x_bar, (o_t,)


def _cotangents(*arguments):
    """Those of x and of x_t, from the arguments of the operator."""
    return tuple(zip(*map(parts, _backward(*arguments), _wanted(*arguments)), strict=True))


def _values(options: Mapping[str, Any]) -> list[Any]:
    """The options in the order of :data:`_OPTIONS`."""
    return [options[part.split()[1]] for part in _OPTIONS.split(", ")]


class _Call:
    """One call's part that is the same for all its kernels: sizes, options and what is visible."""

    def __init__(self, q: Tensor, k: Tensor, seqlens: Tensor | None, cu_seqlens: Tensor | None,
                 cu_seqlens_k: Tensor | None, mask: Tensor | None, bias: Tensor | None, causal: bool, scale: float,
                 window: int | None, softcap: float | None, dropout: float, seed: int,
                 grad_rows: tuple[int, int] | None, tangent_rows: tuple[int, int] | None) -> None:
        self.q, self.k, self.packing = q, k, (cu_seqlens, cu_seqlens_k)
        (_, heads, rows, d), keys = q.shape, k.shape[2]
        everything = (0, rows, 0, keys)
        self.grad_rows = everything if grad_rows is None else (*grad_rows, *grad_rows)
        self.tangent_rows = everything if tangent_rows is None else (*tangent_rows, *tangent_rows)
        mask, bias = (None if t is None else t.expand(q.shape[0], heads, rows, keys) for t in (mask, bias))
        self.arguments = {
            "p_seqlens": seqlens, "p_mask": None if mask is None else mask.view(torch.uint8), "p_bias": bias,
            "s_mask": (0,) * 4 if mask is None else mask.stride(),
            "s_bias": (0,) * 4 if bias is None else bias.stride(),
            "Hq": heads, "Sq": rows, "Sk": keys, "group": heads // k.shape[1], "scale": scale, "cap": softcap or 1.0,
            "window": window or 0, "tangent_rows": self.tangent_rows, "seed": _signed(seed),
            # a kept bit pattern is at least dropout * 2^32; both shifted to the range of int32
            "threshold": round(dropout * 2**32) - 2**31, "inverse": 1 / (1 - dropout),
            "CAUSAL": causal, "WINDOW": window is not None, "CAP": softcap is not None, "DROPOUT": dropout > 0,
            "SOME_T": self.tangent_rows != everything, "D": d, "DP": max(16, triton.next_power_of_2(d)),
            "ACC": accumulator(q.dtype), "PRECISION": dot_precision(q.dtype)}

    def config(self, name: str) -> Config:
        return choose(name, dtype_class(self.q.dtype), self.q.shape[-1], architecture(self.q))

    def run(self, name: str, kernel: Any, span: tuple[int, int], heads: int, **arguments: Any) -> None:
        """Runs a kernel on the rows ``span`` of ``heads`` heads of each sample."""
        config = self.config(name)
        first = span[0] // config.own * config.own
        blocks = triton.cdiv(span[1] - first, config.own)
        grid = (blocks * heads * self.q.shape[0],)
        if grid[0] > 0:
            with on_device(self.q):
                kernel[grid](**arguments, **self.arguments, first=first, blocks=blocks, OWN=config.own,
                             OTHER=config.other, PART=config.part or self.arguments["DP"], num_warps=config.warps,
                             num_stages=config.stages)

    def row_statistics(self, o: Tensor, o_t: Tensor | None, a: Tensor | None, b: Tensor, lse: Tensor,
                       mu: Tensor | None) -> Tensor:
        """What the backward kernels read of each row; with ``mu``, for the cotangents of the primals too."""
        batch, heads, rows, _ = self.q.shape
        blocks = triton.cdiv(rows, STATS.value)
        stats = lse.new_empty(batch, heads, blocks, 4, STATS.value)
        grid = (blocks * (STATS.value // _STATISTICS_ROWS) * heads * batch,)
        if grid[0] > 0:
            o, o_t = rows_dense(o), rows_dense(o_t)
            with on_device(self.q):
                kernels.row_statistics_kernel[grid](
                    o, o_t, a, b, lse, mu, stats, strides(o), strides(o_t), strides(b), heads, rows,
                    self.arguments["D"], self.arguments["DP"], self.arguments["ACC"], _STATISTICS_ROWS, num_warps=4)
        return stats

    def packed_queries(self) -> Tensor | None:
        return _packed_rows(*self.packing, self.q.shape[2])

    def packed_keys(self) -> Tensor | None:
        return _packed_rows(*self.packing[::-1], self.k.shape[2])


def _packed_rows(own: Tensor | None, other: Tensor | None, rows: int) -> Tensor | None:
    """For each row of packed sequences the interval of the other side's rows that its sequence has, and the distance
    from a row to its position there: ``[3, rows]`` int32.
    """
    if own is None or other is None:
        return None
    # one more sequence, without rows, so that there is one
    own, other = (torch.cat([cu, cu[-1:]]).to(torch.int32) for cu in (own, other))
    row = torch.arange(rows, dtype=torch.int32, device=own.device)
    sequence = (torch.searchsorted(own, row, right=True) - 1).clamp(0, own.shape[0] - 2)
    start, end = other[sequence], other[sequence + 1]
    return torch.stack((start, torch.where(row < own[-1], end, start), end - own[sequence + 1]))


def _signed(seed: int) -> int:
    return seed - 2**32 if seed >= 2**31 else seed


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _absent(t: Tensor) -> Tensor:
    return t.new_empty(0)


def _forward_meta(q, k, v, q_t, k_t, v_t, o, lse, *_):
    """``o`` and ``o_t``, stacked if it is both, ``lse``, ``mu``, not written; without elements what is known, or not
    asked for.
    """
    dual = any(t is not None for t in (q_t, k_t, v_t))
    return (like(q, dual + (o is None)), q.new_empty(q.shape[:3], dtype=_wide(q)) if lse is None else _absent(q),
            q.new_empty(q.shape[:3], dtype=_wide(q)) if dual else _absent(q))


def _forward_launch(q, k, v, q_t, k_t, v_t, o, lse, *aux_and_options):
    out = _forward_meta(q, k, v, q_t, k_t, v_t, o, lse)
    known, dual = o is not None, out[2].dim() > 1
    call = _Call(q, k, *aux_and_options)
    (q, q_t), (k, k_t), (v, v_t) = map(one_layout, (q, k, v), (q_t, k_t, v_t))
    made, o_t = parts(out[0], (not known, dual))
    o = o if known else made
    if known and o.stride() != o_t.stride():  # a vendor's output has a layout of its own
        o = torch.empty_like(o_t).copy_(o)
    call.run("dual_forward" if dual else "forward", kernels.forward_kernel, (0, q.shape[2]), q.shape[1],
             p_q=q, p_k=k, p_v=v, p_qt=q_t, p_kt=k_t, p_vt=v_t, p_o=o, p_ot=o_t, p_lse=lse if known else out[1],
             p_mu=out[2] if dual else None, p_rows=call.packed_queries(), s_q=strides(q), s_k=strides(k),
             s_v=strides(v), s_o=strides(o), DUAL=dual, KNOWN=known)
    return out


def _backward_meta(q, k, v, *rest):
    """``dq, dk, dv``, stacked with ``dq_t, dk_t, dv_t``, not written; without elements what is not needed."""
    return tuple(like(t, sum(wanted)) if any(wanted) else _absent(t)
                 for t, wanted in zip((q, k, v), _wanted(q, k, v, *rest), strict=True))


def _wanted(*arguments):
    """``(need, need_t)`` of q, k and v, from the arguments of the operator."""
    return tuple(zip(*arguments[_NEEDS : _NEEDS + 2], strict=True))


def _backward_launch(*arguments):
    q, k, v, q_t, k_t, v_t, o, o_t, lse, mu, a, b, *aux, needs, needs_t = arguments[: _NEEDS + 2]
    options = arguments[_NEEDS + 2 :]
    call = _Call(q, k, *aux, *options)
    grad_rows, tangent_rows = options[-2:]
    primal, out = any(needs), _backward_meta(*arguments)
    (dq, dq_t), (dk, dk_t), (dv, dv_t) = map(parts, out, _wanted(*arguments))
    for group, rows in (((dq, dk, dv), grad_rows), ((dq_t, dk_t, dv_t), tangent_rows)):
        for t in group if rows is not None else ():
            if t is not None:
                t.zero_()
    if not primal:
        q_t = k_t = v_t = a = o_t = mu = None
    (q, q_t), (k, k_t), (v, v_t), (b, a) = map(one_layout, (q, k, v, b), (q_t, k_t, v_t, a))
    tensors = {"p_q": q, "p_k": k, "p_v": v, "p_qt": q_t, "p_kt": k_t, "p_vt": v_t, "p_a": a, "p_b": b,
               "p_stats": call.row_statistics(o, o_t, a, b, lse, mu), "s_q": strides(q), "s_k": strides(k),
               "s_v": strides(v), "s_b": strides(b), "grad_rows": call.grad_rows}
    kind = "dual_backward" if primal else "backward"
    if needs[0] or needs_t[0]:
        call.run(f"{kind}_queries", kernels.backward_queries_kernel, _span(call, 0, needs[0], needs_t[0]), q.shape[1],
                 p_dq=dq, p_dqt=dq_t, s_dq=strides(dq if needs[0] else dq_t), p_rows=call.packed_queries(), **tensors)
    if any((*needs[1:], *needs_t[1:])):
        launches = [(f"{kind}_keys", dk, dv, dk_t, dv_t)]
        if primal and call.config("dual_backward_keys").apart:
            launches = [("dual_backward_keys", dk, dv, None, None), ("backward_keys", None, None, dk_t, dv_t)]
            launches = [(name, *t) for name, *t in launches if any(g is not None for g in t)]
        for name, dk, dv, dk_t, dv_t in launches:
            if name == "backward_keys":
                tensors |= dict.fromkeys(("p_qt", "p_kt", "p_vt", "p_a"))
            span = _span(call, 2, dk is not None or dv is not None, dk_t is not None or dv_t is not None)
            call.run(name, kernels.backward_keys_kernel, span, k.shape[1], p_dk=dk, p_dv=dv, p_dkt=dk_t, p_dvt=dv_t,
                     s_dk=strides(dk_t if dk is None else dk), s_dv=strides(dv_t if dv is None else dv),
                     p_rows=call.packed_keys(), **tensors)
    return out


def _span(call: _Call, side: int, primal: bool, tangent: bool) -> tuple[int, int]:
    """The rows of queries (side 0) or keys (side 2) whose cotangents are wanted."""
    ranges = [rows[side : side + 2] for rows in [call.grad_rows] * primal + [call.tangent_rows] * tangent]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


_SHARED, _BROADCAST = ("cu_seqlens", "cu_seqlens_k"), ("mask", "bias")
_forward = define(
    "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, Tensor? q_t, Tensor? k_t, Tensor? v_t, Tensor? o, Tensor? lse, {_AUX}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)", _forward_launch, _forward_meta, _SHARED, _BROADCAST, ranks=(4, 3, 3))
_backward = define(
    "attention_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor? q_t, Tensor? k_t, Tensor? v_t, Tensor o, Tensor? o_t, Tensor lse, "
    f"Tensor? mu, Tensor? a, Tensor b, {_AUX}, bool[] needs, bool[] needs_t, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)", _backward_launch, _backward_meta, _SHARED, _BROADCAST, ranks=(4, 4, 4))
#: Where ``needs`` and ``needs_t`` stand among its arguments.
_NEEDS = 17
