"""Attention kernels, a block of rows of a few samples at a time. Derivation and names: docs/attention.md.

Inside a block the query heads of a group are laid one below the other, so that grouped-query attention is plain
matrix products: q is [n * Hkv, G * rows, d], k is [n * Hkv, keys, d], row scalars are columns [n * Hkv, G * rows, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gradmem_kernels.reference.common import add, cast, is_wrapped, mul_, sub_, wide

#: Rows of a block, and elements of its score matrices: on a CPU, what stays in its cache.
ROWS = {"cpu": 64}
SCORES = {"cpu": 2**20}
ROWS_ELSEWHERE, SCORES_ELSEWHERE = 1024, 2**28


def forward(x, aux, *, causal, scale):
    o, lse = _blocks(partial(_forward, scale), "qkk", "qc", x, aux, causal)
    return (cast(o, x[0]),), (lse,)


def backward(x, aux, y, saved, y_bar, needs, *, causal, scale):
    out = _blocks(partial(_backward, scale, needs), "qkkqcq", "qkk", (*x, *y, *saved, *y_bar), aux, causal)
    return _select(x, out, needs)


def dual_forward(x, aux, x_t, *, causal, scale):
    o, o_t, lse, mu = _blocks(partial(_dual_forward, scale), "qkkqkk", "qqcc", (*x, *x_t), aux, causal)
    return (cast(o, x[0]),), (cast(o_t, x[0]),), (lse, mu)


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, causal, scale):
    tensors = (*x, *x_t, *y, *y_t, *saved, *y_bar, *y_t_bar)
    out = _blocks(partial(_dual_backward, scale, needs, needs_t), "qkkqkkqqccqq", "qkkqkk", tensors, aux, causal)
    return _select(x, out[:3], needs), _select(x, out[3:], needs_t)


def double_backward(x, aux, x_t, y, saved, y_bar, needs, *, causal, scale):
    tensors = (*x, *x_t, *y, *saved, *y_bar)
    *x_bar, o_t = _blocks(partial(_double_backward, scale, needs), "qkkqkkqcq", "qkkq", tensors, aux, causal)
    return _select(x, x_bar, needs), (cast(o_t, x[0]),)


def _forward(scale, hidden, q, k, v):
    p, row_max, row_sum = _unnormalised(_scores(hidden, q, k, scale))
    return (p @ v) / row_sum, row_max + row_sum.log()


def _backward(scale, needs, hidden, q, k, v, o, lse, do):
    p = _probabilities(hidden, q, k, lse, scale)
    dv = p.mT @ do if needs[2] else None
    ds = mul_(sub_(do @ v.mT, _row_dot(do, o)), p) if needs[0] or needs[1] else None
    dq = _product(ds, k, scale) if needs[0] else None
    dk = _product(_mT(ds), q, scale) if needs[1] else None
    return dq, dk, dv


def _dual_forward(scale, hidden, q, k, v, q_t, k_t, v_t):
    p, row_max, row_sum = _unnormalised(_scores(hidden, q, k, scale))
    o = (p @ v) / row_sum
    mu, o_t = _tangent(p, _scores_t(q, k, q_t, k_t, scale), v, v_t, o, row_sum)
    return o, o_t, row_max + row_sum.log(), torch.zeros_like(row_sum) if mu is None else mu


def _dual_backward(scale, needs, needs_t, hidden, q, k, v, q_t, k_t, v_t, o, o_t, lse, mu, a, b):
    # a, b: cotangents of o, o_t
    p = _probabilities(hidden, q, k, lse, scale)
    # P_t = P * (S_t - mu)
    s_t = _scores_t(q, k, q_t, k_t, scale) if any(needs) else None
    p_t = None if s_t is None else mul_(sub_(s_t, mu), p)
    ds, ds_t = _d_scores(p, p_t, v, v_t, o, o_t, a, b, needs, needs_t)
    return (*_d_primals(p, p_t, ds, ds_t, q, k, q_t, k_t, a, b, scale, needs),
            *_d_tangents(p, ds, q, k, b, scale, needs_t))


def _double_backward(scale, needs, hidden, q, k, v, q_t, k_t, v_t, o, lse, b):
    p = _probabilities(hidden, q, k, lse, scale)
    s_t = _scores_t(q, k, q_t, k_t, scale)
    mu, o_t = _tangent(p, s_t.clone() if any(needs) and s_t is not None else s_t, v, v_t, o, None)
    p_t = None if s_t is None or not any(needs) else mul_(sub_(s_t, mu), p)
    ds, ds_t = _d_scores(p, p_t, v, v_t, o, o_t, None, b, needs, (False,) * 3)
    return (*_d_primals(p, p_t, ds, ds_t, q, k, q_t, k_t, None, b, scale, needs), o_t)


def _scores(hidden: Tensor | None, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q k^T, less infinity where a key is hidden."""
    # on a CPU one call, faster than filling in
    return (q @ k.mT).mul_(scale) if hidden is None else torch.baddbmm(hidden, q, k.mT, alpha=scale)


def _unnormalised(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p = exp(s - max), its row maximum and its row sum; a row that sees no key has the sum infinity and p = 0."""
    row_max = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    p = sub_(s, row_max).exp_()
    row_sum = p.sum(-1, keepdim=True)
    return p, row_max, row_sum.masked_fill(row_sum == 0, torch.inf)


def _probabilities(hidden: Tensor | None, q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    return sub_(_scores(hidden, q, k, scale), lse).exp_()


def _scores_t(q: Tensor, k: Tensor, q_t: Tensor | None, k_t: Tensor | None, scale: float) -> Tensor | None:
    """S_t = scale * (q_t k^T + q k_t^T)."""
    return _products((None if q_t is None else q_t * scale, _mT(k)), (q * scale, _mT(k_t)))


def _tangent(p: Tensor, s_t: Tensor | None, v: Tensor, v_t: Tensor | None, o: Tensor,
             row_sum: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """mu = rowsum(P * S_t) and o_t = (P * S_t) v - mu * o + P v_t; P = p / row_sum. Writes over ``s_t``."""
    ps_t = None if s_t is None else mul_(s_t, p)
    mu = None if s_t is None else ps_t.sum(-1, keepdim=True)
    o_t = _products((ps_t, v), (p, v_t))
    if row_sum is not None:
        mu, o_t = None if mu is None else mu / row_sum, o_t / row_sum
    return mu, o_t if mu is None else sub_(o_t, mu * o)


def _d_scores(p, p_t, v, v_t, o, o_t, a, b, needs, needs_t) -> tuple[Tensor | None, Tensor | None]:
    """dS = P * (dP - D) and dS_t = P_t * (dP - D) + P * (dP_t - D_t)."""
    ds = ds_t = None
    if any(needs[:2]):
        # dP_t = a v^T + b v_t^T,  D_t = rowsum(a * o + b * o_t)
        dp_t = _products((a, v.mT), (b, _mT(v_t)))
        d_t = add(None if a is None else _row_dot(a, o), None if b is None else _row_dot(b, o_t))
        if d_t is not None:
            ds_t = -(p * d_t) if dp_t is None else mul_(sub_(dp_t, d_t), p)
    if b is not None and any((*needs[:2], *needs_t[:2])):
        # dP - D, with dP = b v^T, D = rowsum(b * o)
        dp = sub_(b @ v.mT, _row_dot(b, o))
        if ds_t is not None and p_t is not None:
            ds_t = ds_t + p_t * dp if is_wrapped(dp) or is_wrapped(p_t) else ds_t.addcmul_(p_t, dp)
        ds = mul_(dp, p)
    return ds, ds_t


def _d_primals(p, p_t, ds, ds_t, q, k, q_t, k_t, a, b, scale, needs):
    dq = _products((ds_t, k), (ds, k_t)) if needs[0] else None
    dk = _products((_mT(ds_t), q), (_mT(ds), q_t)) if needs[1] else None
    dv = _products((_mT(p_t), b), (p.mT, a)) if needs[2] else None
    return None if dq is None else dq.mul_(scale), None if dk is None else dk.mul_(scale), dv


def _d_tangents(p, ds, q, k, b, scale, needs_t):
    """An ordinary backward with b in the place of do."""
    return (_product(ds, k, scale) if needs_t[0] else None, _product(_mT(ds), q, scale) if needs_t[1] else None,
            None if b is None or not needs_t[2] else p.mT @ b)


def _products(*pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """The sum of batched matrix products, leaving out known zeros."""
    total = None
    for a, b in pairs:
        if a is not None and b is not None:
            total = a @ b if total is None else torch.baddbmm(total, a, b)
    return total


def _product(a: Tensor | None, b: Tensor, scale: float) -> Tensor | None:
    return None if a is None else (a @ b).mul_(scale)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _mT(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.mT


class _Block(NamedTuple):
    """Some samples, some of their rows, and the number of keys that these may see."""

    samples: slice
    rows: slice
    keys: int


def _blocks(kernel: Callable[..., tuple[Tensor | None, ...]], kinds: str, out_kinds: str,
            tensors: tuple[Tensor | None, ...], aux: tuple[Tensor | None], causal: bool) -> tuple[Tensor | None, ...]:
    """Runs ``kernel(hidden, *tensors)`` block by block and puts its results together.

    ``kinds`` has a letter for each tensor: ``q`` for ``[B, Hq, Sq, d]``, ``c`` for ``[B, Hq, Sq]``, ``k`` for
    ``[B, Hkv, Sk, d]``.
    """
    (q, k), (seqlens,) = tensors[:2], aux
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    blocks = [_Block(slice(0, q.shape[0]), slice(0, q.shape[2]), k.shape[2])]
    if not any(t is not None and is_wrapped(t) for t in (*tensors, seqlens)):
        blocks = _cut(q, k, causal) or blocks
    out: list[Tensor | None] = []
    for block in blocks:
        hidden = _hidden(block, q, k, seqlens, causal)
        parts = kernel(hidden, *(_fold(t, kind, block, kv_heads, group)
                                 for t, kind in zip(tensors, kinds, strict=True)))
        results = tuple(_unfold(t, kind, block, k if kind == "k" else q)
                        for t, kind in zip(parts, out_kinds, strict=True))
        if len(blocks) == 1:
            return results
        out = out or [_whole(t, kind, q, k) for t, kind in zip(results, out_kinds, strict=True)]
        for total, t, kind in zip(out, results, out_kinds, strict=True):
            if t is None:
                continue
            if kind != "k":
                total[block.samples, :, block.rows] = t
            elif block.rows.stop == q.shape[2]:  # the first block of these samples, which sees every key
                total[block.samples] = t
            else:
                total[block.samples, :, : block.keys] += t
    return tuple(out)


def _cut(q: Tensor, k: Tensor, causal: bool) -> list[_Block]:
    """The last rows, which see most keys, come first."""
    (batch, heads, rows, _), keys, device = q.shape, k.shape[2], q.device.type
    size = -(-rows // max(1, -(-rows // ROWS.get(device, ROWS_ELSEWHERE))))
    blocks = []
    for last in range(rows, 0, -max(1, size)):
        seen = min(keys, max(1, last + keys - rows)) if causal else keys
        samples = max(1, SCORES.get(device, SCORES_ELSEWHERE) // max(1, heads * size * seen))
        blocks += [_Block(slice(i, min(i + samples, batch)), slice(max(0, last - size), last), seen)
                   for i in range(0, batch, samples)]
    return blocks


def _fold(t: Tensor | None, kind: str, block: _Block, kv_heads: int, group: int) -> Tensor | None:
    if t is None:
        return None
    samples, rows = block.samples, slice(0, block.keys) if kind == "k" else block.rows
    # not t[samples, :, rows], which under vmap is refused where it selects everything
    t = t.narrow(0, samples.start, samples.stop - samples.start).narrow(2, rows.start, rows.stop - rows.start)
    if kind == "c":
        t = t.unsqueeze(-1)
    batch, _, length, width = t.shape
    return wide(t.reshape(batch * kv_heads, length if kind == "k" else group * length, width))


def _unfold(t: Tensor | None, kind: str, block: _Block, like: Tensor) -> Tensor | None:
    if t is None:
        return None
    samples, rows = (s.stop - s.start for s in (block.samples, block.rows))
    t = t.reshape(samples, like.shape[1], block.keys if kind == "k" else rows, t.shape[-1])
    return t.squeeze(-1) if kind == "c" else t


def _whole(t: Tensor | None, kind: str, q: Tensor, k: Tensor) -> Tensor | None:
    return None if t is None else t.new_empty(*(k if kind == "k" else q).shape[:3], *t.shape[3:])


def _hidden(block: _Block, q: Tensor, k: Tensor, seqlens: Tensor | None, causal: bool) -> Tensor | None:
    """0, or less infinity where a key is hidden from a query; broadcastable to the block's scores."""
    if not causal and seqlens is None:
        return None
    rows, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    i = torch.arange(block.rows.start, block.rows.stop, device=q.device).unsqueeze(-1)
    j = torch.arange(block.keys, device=q.device)
    hidden = j > i + (keys - rows) if causal else None
    if seqlens is not None:
        valid = seqlens.narrow(0, block.samples.start, block.samples.stop - block.samples.start).view(-1, 1, 1)
        padding = (j >= valid).expand(-1, i.shape[0], -1)
        if rows == keys:
            padding = padding | (i >= valid)
        hidden = padding if hidden is None else hidden | padding
        # [n, rows, keys] -> [n * Hkv, rows, keys]
        hidden = hidden.repeat_interleave(k.shape[1], 0)
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=q.device).masked_fill(hidden, -torch.inf)
    return bias if group == 1 else bias.repeat(*(1,) * (bias.dim() - 2), group, 1)


def _select(x, x_bar, needs):
    """The cotangents that are needed, in the dtypes of ``x``; a known zero as zeros."""
    return tuple(cast(g, t) if need else None for t, g, need in zip(x, x_bar, needs, strict=True))
