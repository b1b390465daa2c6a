"""Attention kernels, a block of rows of a few samples at a time. Derivation and names: docs/attention.md.

Inside a block the query heads of a group are laid one below the other, so that grouped-query attention is plain
matrix products: q is [n * Hkv, G * rows, d], k is [n * Hkv, keys, d], row scalars are columns [n * Hkv, G * rows, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gradmem_kernels.reference.common import add, add_, cast, is_wrapped, mul_, sub_, wide
from gradmem_kernels.reference.visible import Block, Rows, Scores, Settings, cut, scores_of


def forward(x, aux, **options):
    o, lse = _blocks(_forward, "qkk", "qc", x, Settings(*aux, **options))
    return (cast(o, x[0]),), (lse,)


def backward(x, aux, y, saved, y_bar, needs, **options):
    settings = Settings(*aux, **options)
    rows = settings.grad_rows
    out = _blocks(partial(_backward, needs), "qkkqcq", "qkk", (*x, *y, *saved, *y_bar), settings, rows)
    return _select(x, out, needs, rows)


def dual_forward(x, aux, x_t, **options):
    settings = Settings(*aux, **options)
    rows = settings.tangent_rows
    if rows is None:
        o, o_t, lse, mu = _blocks(_dual_forward, "qkkqkk", "qqcc", (*x, *x_t), settings)
    else:
        o, lse = _blocks(_forward, "qkk", "qc", x, settings)
        tensors = (*x, *(_only(t, rows) for t in x_t), o, lse)
        o_t, mu = _blocks(_tangent_forward, "qkkqkkqc", "qc", tensors, settings, rows)
    return (cast(o, x[0]),), (cast(o_t, x[0]),), (lse, mu)


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, **options):
    settings = Settings(*aux, **options)
    grad_rows, tangent_rows = settings.grad_rows, settings.tangent_rows
    touched = _hull(*(rows for rows, some in ((grad_rows, needs), (tangent_rows, needs_t)) if any(some)))
    tensors = (*x, *(_only(t, tangent_rows) for t in x_t), *y, *y_t, *saved, *y_bar, *y_t_bar)
    out = _blocks(partial(_dual_backward, needs, needs_t), "qkkqkkqqccqq", "qkkqkk", tensors, settings, touched)
    return _select(x, out[:3], needs, grad_rows), _select(x, out[3:], needs_t, tangent_rows)


def double_backward(x, aux, x_t, y, saved, y_bar, needs, **options):
    settings = Settings(*aux, **options)
    grad_rows, tangent_rows = settings.grad_rows, settings.tangent_rows
    tensors = (*x, *(_only(t, tangent_rows) for t in x_t), *y, *saved, *y_bar)
    *x_bar, o_t = _blocks(partial(_double_backward, needs), "qkkqkkqcq", "qkkq", tensors, settings,
                          _hull(grad_rows, tangent_rows))
    return _select(x, x_bar, needs, grad_rows), (cast(o_t, x[0]),)


def _forward(scores, q, k, v):
    p, row_max, row_sum = _unnormalised(_scores(scores, q, k)[0])
    return (_drop(scores, p) @ v) / row_sum, row_max + row_sum.log()


def _backward(needs, scores, q, k, v, o, lse, do):
    p, u = _probabilities(scores, q, k, lse)
    dv = _drop(scores, p).mT @ do if needs[2] else None
    ds = None
    if needs[0] or needs[1]:
        # dS = P * (dP - D) as for S, then for scale * q k^T
        ds, _ = _uncap(scores, u, None, mul_(sub_(_drop(scores, do @ v.mT), _row_dot(do, o)), p), None)
    dq = _product(ds, k, scores.scale) if needs[0] else None
    dk = _product(_mT(ds), q, scores.scale) if needs[1] else None
    return dq, dk, dv


def _dual_forward(scores, q, k, v, q_t, k_t, v_t):
    s, u = _scores(scores, q, k)
    p, row_max, row_sum = _unnormalised(s)
    o = (_drop(scores, p) @ v) / row_sum
    mu, o_t = _tangent(scores, p, _scores_t(scores, u, q, k, q_t, k_t), v, v_t, o, row_sum)
    return o, o_t, row_max + row_sum.log(), torch.zeros_like(row_sum) if mu is None else mu


def _tangent_forward(scores, q, k, v, q_t, k_t, v_t, o, lse):
    p, u = _probabilities(scores, q, k, lse)
    mu, o_t = _tangent(scores, p, _scores_t(scores, u, q, k, q_t, k_t), v, v_t, o, None)
    return o_t, torch.zeros_like(lse) if mu is None else mu


def _dual_backward(needs, needs_t, scores, q, k, v, q_t, k_t, v_t, o, o_t, lse, mu, a, b):
    # a, b: cotangents of o, o_t
    p, u = _probabilities(scores, q, k, lse)
    s_t = _scores_t(scores, u, q, k, q_t, k_t) if any(needs) else None
    p_t = _probabilities_t(p, u, s_t, mu)
    ds, ds_t = _d_scores(scores, p, p_t, v, v_t, o, o_t, a, b, needs, needs_t)
    ds, ds_t = _uncap(scores, u, s_t, ds, ds_t)
    return (*_d_primals(scores, p, p_t, ds, ds_t, q, k, q_t, k_t, a, b, needs),
            *_d_tangents(scores, p, ds, q, k, b, needs_t))


def _double_backward(needs, scores, q, k, v, q_t, k_t, v_t, o, lse, b):
    p, u = _probabilities(scores, q, k, lse)
    s_t = _scores_t(scores, u, q, k, q_t, k_t)
    mu, o_t = _tangent(scores, p, s_t.clone() if any(needs) and s_t is not None else s_t, v, v_t, o, None)
    if not any(needs):
        return None, None, None, o_t
    p_t = _probabilities_t(p, u, s_t, mu)
    ds, ds_t = _d_scores(scores, p, p_t, v, v_t, o, o_t, None, b, needs, (False,) * 3)
    ds, ds_t = _uncap(scores, u, s_t, ds, ds_t)
    return (*_d_primals(scores, p, p_t, ds, ds_t, q, k, q_t, k_t, None, b, needs), o_t)


def _scores(scores: Scores, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """S, and where it is capped u = tanh(scale * q k^T / c)."""
    c, added = scores.softcap, scores.added
    if c is None:
        # on a CPU one call, faster than adding
        s = (q @ k.mT).mul_(scores.scale) if added is None else torch.baddbmm(added, q, k.mT, alpha=scores.scale)
        return s, None
    u = (q @ k.mT).mul_(scores.scale / c).tanh_()
    return add_(u * c, added), u


def _unnormalised(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p = exp(s - max), its row maximum and its row sum; a row that sees no key has the sum infinity and p = 0."""
    row_max = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    p = sub_(s, row_max).exp_()
    row_sum = p.sum(-1, keepdim=True)
    return p, row_max, row_sum.masked_fill(row_sum == 0, torch.inf)


def _probabilities(scores: Scores, q: Tensor, k: Tensor, lse: Tensor) -> tuple[Tensor, Tensor | None]:
    """P and u."""
    s, u = _scores(scores, q, k)
    return sub_(s, lse).exp_(), u


def _scores_t(scores: Scores, u: Tensor | None, q: Tensor, k: Tensor, q_t: Tensor | None,
              k_t: Tensor | None) -> Tensor | None:
    """S_t = scale * (q_t k^T + q k_t^T), times 1 - u^2 where S is capped."""
    s_t = _products((None if q_t is None else q_t * scores.scale, _mT(k)), (q * scores.scale, _mT(k_t)))
    return s_t if u is None or s_t is None else mul_(s_t, 1 - u * u)


def _probabilities_t(p: Tensor, u: Tensor | None, s_t: Tensor | None, mu: Tensor) -> Tensor | None:
    """P_t = P * (S_t - mu). Writes over ``s_t`` unless :func:`_uncap` reads it."""
    return None if s_t is None else mul_(sub_(s_t, mu) if u is None else s_t - mu, p)


def _uncap(scores: Scores, u: Tensor | None, s_t: Tensor | None, ds: Tensor | None,
           ds_t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The cotangents of scale * q k^T and of its tangent, from those of S and S_t: one for both unless S is capped."""
    if u is None:
        return ds, ds_t
    slope = 1 - u * u
    # slope * dS_t - 2 u / c * S_t * dS
    ds_t = None if ds_t is None else ds_t * slope
    if s_t is not None and ds is not None:
        ds_t = add(ds_t, u * s_t * ds * (-2 / scores.softcap))
    return None if ds is None else ds * slope, ds_t


def _drop(scores: Scores, t: Tensor | None) -> Tensor | None:
    """Z * t."""
    return t if t is None or scores.factors is None else t * scores.factors


def _tangent(scores: Scores, p: Tensor, s_t: Tensor | None, v: Tensor, v_t: Tensor | None, o: Tensor,
             row_sum: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """mu = rowsum(P * S_t) and o_t = (Z * P * S_t) v - mu * o + (Z * P) v_t; P = p / row_sum. Writes over ``s_t``."""
    ps_t = None if s_t is None else mul_(s_t, p)
    mu = None if s_t is None else ps_t.sum(-1, keepdim=True)
    o_t = _products((_drop(scores, ps_t), v), (_drop(scores, p), v_t))
    if row_sum is not None:
        mu, o_t = None if mu is None else mu / row_sum, o_t / row_sum
    return mu, o_t if mu is None else sub_(o_t, mu * o)


def _d_scores(scores, p, p_t, v, v_t, o, o_t, a, b, needs, needs_t) -> tuple[Tensor | None, Tensor | None]:
    """dS = P * (dP - D) and dS_t = P_t * (dP - D) + P * (dP_t - D_t)."""
    ds = ds_t = None
    if any(needs[:2]):
        # dP_t = Z * (a v^T + b v_t^T),  D_t = rowsum(a * o + b * o_t)
        dp_t = _drop(scores, _products((a, v.mT), (b, _mT(v_t))))
        d_t = add(None if a is None else _row_dot(a, o), None if b is None else _row_dot(b, o_t))
        if d_t is not None:
            ds_t = -(p * d_t) if dp_t is None else mul_(sub_(dp_t, d_t), p)
    if b is not None and any((*needs[:2], *needs_t[:2])):
        # dP - D, with dP = Z * (b v^T), D = rowsum(b * o)
        dp = sub_(_drop(scores, b @ v.mT), _row_dot(b, o))
        if ds_t is not None and p_t is not None:
            ds_t = ds_t + p_t * dp if is_wrapped(dp) or is_wrapped(p_t) else ds_t.addcmul_(p_t, dp)
        ds = mul_(dp, p)
    return ds, ds_t


def _d_primals(scores, p, p_t, ds, ds_t, q, k, q_t, k_t, a, b, needs):
    dq = _products((ds_t, k), (ds, k_t)) if needs[0] else None
    dk = _products((_mT(ds_t), q), (_mT(ds), q_t)) if needs[1] else None
    # (Z * P_t)^T b + (Z * P)^T a
    dv = _products((_mT(_drop(scores, p_t)), b), (_drop(scores, p).mT, a)) if needs[2] else None
    return None if dq is None else dq.mul_(scores.scale), None if dk is None else dk.mul_(scores.scale), dv


def _d_tangents(scores, p, ds, q, k, b, needs_t):
    """An ordinary backward with b in the place of do."""
    return (_product(ds, k, scores.scale) if needs_t[0] else None,
            _product(_mT(ds), q, scores.scale) if needs_t[1] else None,
            None if b is None or not needs_t[2] else _drop(scores, p).mT @ b)


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


def _blocks(kernel: Callable[..., tuple[Tensor | None, ...]], kinds: str, out_kinds: str,
            tensors: tuple[Tensor | None, ...], settings: Settings, touched: Rows = None) -> tuple[Tensor | None, ...]:
    """Runs ``kernel(scores, *tensors)`` block by block and puts its results together.

    ``kinds`` has a letter for each tensor: ``q`` for ``[B, Hq, Sq, d]``, ``c`` for ``[B, Hq, Sq]``, ``k`` for
    ``[B, Hkv, Sk, d]``. Results are asked for ``touched`` rows and keys alone, where given.
    """
    q, k = tensors[:2]
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    whole = Block(slice(0, q.shape[0]), slice(0, q.shape[2]), slice(0, k.shape[2]))
    blocks = [whole]
    if not any(t is not None and is_wrapped(t) for t in (*tensors, *settings[:5])):
        blocks = cut(q, k, settings, touched) or blocks
    out: list[Tensor | None] = [None] * len(out_kinds)
    for block in blocks:
        parts = kernel(scores_of(block, q, k, settings), *(_fold(t, kind, block, kv_heads, group)
                                                           for t, kind in zip(tensors, kinds, strict=True)))
        results = tuple(_unfold(t, kind, block, k if kind == "k" else q)
                        for t, kind in zip(parts, out_kinds, strict=True))
        if blocks == [whole]:
            return results
        for n, (t, kind) in enumerate(zip(results, out_kinds, strict=True)):
            if t is None:
                continue
            if out[n] is None:
                out[n] = t.new_zeros(*(k if kind == "k" else q).shape[:3], *t.shape[3:])
            if kind == "k":
                out[n][block.samples, :, block.keys] += t
            else:
                out[n][block.samples, :, block.rows] = t
    return tuple(out)


def _fold(t: Tensor | None, kind: str, block: Block, kv_heads: int, group: int) -> Tensor | None:
    if t is None:
        return None
    samples, rows = block.samples, block.keys if kind == "k" else block.rows
    # not t[samples, :, rows], which under vmap is refused where it selects everything
    t = t.narrow(0, samples.start, samples.stop - samples.start).narrow(2, rows.start, rows.stop - rows.start)
    if kind == "c":
        t = t.unsqueeze(-1)
    batch, _, length, width = t.shape
    return wide(t.reshape(batch * kv_heads, length if kind == "k" else group * length, width))


def _unfold(t: Tensor | None, kind: str, block: Block, like: Tensor) -> Tensor | None:
    if t is None:
        return None
    samples, rows = (s.stop - s.start for s in (block.samples, block.keys if kind == "k" else block.rows))
    t = t.reshape(samples, like.shape[1], rows, t.shape[-1])
    return t.squeeze(-1) if kind == "c" else t


def _select(x, x_bar, needs, rows):
    """The cotangents that are needed, in the dtypes of ``x``; a known zero as zeros."""
    return tuple(_only(cast(g, t), rows) if need else None for t, g, need in zip(x, x_bar, needs, strict=True))


def _only(t: Tensor | None, rows: Rows) -> Tensor | None:
    """``t`` in these rows, 0 in the others."""
    if t is None or rows is None:
        return t
    i = torch.arange(t.shape[2], device=t.device).unsqueeze(-1)
    return t.masked_fill((i < rows[0]) | (i >= rows[1]), 0.0)


def _hull(*ranges: Rows) -> Rows:
    """The smallest range that holds these; ``None`` is everything."""
    return None if None in ranges else (min(start for start, _ in ranges), max(stop for _, stop in ranges))
