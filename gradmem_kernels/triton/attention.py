"""Attention on Triton: the kernels' launch. Derivation: docs/attention.md."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from gradmem_kernels.operators.attention import Attention, Backward, Forward, Settings, packed_rows
from gradmem_kernels.operators.define import one_layout, rows_dense, strides
from gradmem_kernels.triton import attention_kernels as kernels
from gradmem_kernels.triton.attention_configs import HEAD_DIMS, Config, choose, dtype_class
from gradmem_kernels.triton.attention_tiles import STATS
from gradmem_kernels.triton.common import accumulator, architecture, dot_precision, on_device
from gradmem_kernels.triton.common import refusal as refusal_of

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


class _Call:
    """One call's part that is the same for all its kernels: sizes, options and what is visible."""

    def __init__(self, q: Tensor, k: Tensor, settings: Settings) -> None:
        (seqlens, cu_seqlens, cu_seqlens_k, mask, bias, causal, scale, window, softcap, dropout, seed, grad_rows,
         tangent_rows) = settings
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
        return packed_rows(*self.packing, self.q.shape[2], torch.int32)

    def packed_keys(self) -> Tensor | None:
        return packed_rows(*self.packing[::-1], self.k.shape[2], torch.int32)


def _signed(seed: int) -> int:
    return seed - 2**32 if seed >= 2**31 else seed


def _launch_forward(tensors: Forward, settings: Settings, o: Tensor | None, o_t: Tensor | None, lse: Tensor | None,
                    mu: Tensor | None) -> None:
    (q, q_t), (k, k_t), (v, v_t) = map(one_layout, tensors[:3], tensors[3:6])
    call = _Call(tensors.q, tensors.k, settings)
    known = o is None
    if o is None:
        o = tensors.o
        if o.stride() != o_t.stride():  # a vendor's output has a layout of its own
            o = torch.empty_like(o_t).copy_(o)
    call.run("forward" if o_t is None else "dual_forward", kernels.forward_kernel, (0, q.shape[2]), q.shape[1],
             p_q=q, p_k=k, p_v=v, p_qt=q_t, p_kt=k_t, p_vt=v_t, p_o=o, p_ot=o_t, p_lse=tensors.lse if known else lse,
             p_mu=mu, p_rows=call.packed_queries(), s_q=strides(q), s_k=strides(k), s_v=strides(v), s_o=strides(o),
             DUAL=o_t is not None, KNOWN=known)


def _launch_backward(tensors: Backward, settings: Settings, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
                     dq_t: Tensor | None, dk_t: Tensor | None, dv_t: Tensor | None) -> None:
    q, k, v, q_t, k_t, v_t, o, o_t, lse, mu, a, b, needs, needs_t = tensors
    call = _Call(q, k, settings)
    (q, q_t), (k, k_t), (v, v_t), (b, a) = map(one_layout, (q, k, v, b), (q_t, k_t, v_t, a))
    arguments = {"p_q": q, "p_k": k, "p_v": v, "p_qt": q_t, "p_kt": k_t, "p_vt": v_t, "p_a": a, "p_b": b,
                 "p_stats": call.row_statistics(o, o_t, a, b, lse, mu), "s_q": strides(q), "s_k": strides(k),
                 "s_v": strides(v), "s_b": strides(b), "grad_rows": call.grad_rows}
    kind = "dual_backward" if any(needs) else "backward"
    if needs[0] or needs_t[0]:
        call.run(f"{kind}_queries", kernels.backward_queries_kernel, _span(call, 0, needs[0], needs_t[0]), q.shape[1],
                 p_dq=dq, p_dqt=dq_t, s_dq=strides(dq if needs[0] else dq_t), p_rows=call.packed_queries(), **arguments)
    if any((*needs[1:], *needs_t[1:])):
        apart = any(needs) and call.config("dual_backward_keys").apart
        launches = {f"{kind}_keys": (dk, dv, dk_t, dv_t)}
        if apart:
            launches = {"dual_backward_keys": (dk, dv, None, None), "backward_keys": (None, None, dk_t, dv_t)}
        for name, (dk, dv, dk_t, dv_t) in launches.items():
            if all(t is None for t in (dk, dv, dk_t, dv_t)):
                continue
            if name == "backward_keys":
                arguments |= dict.fromkeys(("p_qt", "p_kt", "p_vt", "p_a"))
            span = _span(call, 2, dk is not None or dv is not None, dk_t is not None or dv_t is not None)
            call.run(name, kernels.backward_keys_kernel, span, k.shape[1], p_dk=dk, p_dv=dv, p_dkt=dk_t, p_dvt=dv_t,
                     s_dk=strides(dk_t if dk is None else dk), s_dv=strides(dv_t if dv is None else dv),
                     p_rows=call.packed_keys(), **arguments)


def _span(call: _Call, side: int, primal: bool, tangent: bool) -> tuple[int, int]:
    """The rows of queries (side 0) or keys (side 2) whose cotangents are wanted."""
    ranges = [rows[side : side + 2] for rows in [call.grad_rows] * primal + [call.tangent_rows] * tangent]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


_operators = Attention("triton", _launch_forward, _launch_backward)
forward, backward = _operators.forward, _operators.backward
dual_forward, dual_backward = _operators.dual_forward, _operators.dual_backward
double_backward = _operators.double_backward
