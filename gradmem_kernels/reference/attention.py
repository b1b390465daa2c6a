"""Attention kernels, with the score matrices of a few samples at a time. Derivation and names: docs/attention.md.

The query heads of a group are laid one below the other, so that grouped-query attention is plain matrix products:
q is [B, Hkv, G * Sq, d], the scores are [B, Hkv, G * Sq, Sk].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gradmem_kernels.reference.common import add, by_samples, cast, mul_, sub_, wide

#: Elements of the score matrix that are worked on at a time: on a CPU, what stays in its cache.
SCORES = {"cpu": 2**18}
SCORES_ELSEWHERE = 2**28


def forward(x, aux, *, causal, scale):
    o, lse = _by_samples(partial(_forward, causal, scale), *x, *aux)
    return (o,), (lse,)


def backward(x, aux, y, saved, y_bar, needs, *, causal, scale):
    return _by_samples(partial(_backward, causal, scale, needs), *x, *aux, *y, *saved, *y_bar)


def dual_forward(x, aux, x_t, *, causal, scale):
    o, o_t, lse, mu = _by_samples(partial(_dual_forward, causal, scale), *x, *aux, *x_t)
    return (o,), (o_t,), (lse, mu)


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, causal, scale):
    kernel = partial(_dual_backward, causal, scale, needs, needs_t)
    out = _by_samples(kernel, *x, *aux, *x_t, *y, *y_t, *saved, *y_bar, *y_t_bar)
    return out[:3], out[3:]


def double_backward(x, aux, x_t, y, saved, y_bar, needs, *, causal, scale):
    *x_bar, o_t = _by_samples(partial(_double_backward, causal, scale, needs), *x, *aux, *x_t, *y, *saved, *y_bar)
    return tuple(x_bar), (o_t,)


def _forward(causal, scale, q, k, v, seqlens):
    group = _Group(q, k)
    s = _scores(group, group.fold(q), wide(k), seqlens, causal, scale)
    p, row_max, row_sum = _unnormalised(s)
    o = (p @ wide(v)) / row_sum
    return group.unfold(o, q), _lse(group, row_max, row_sum)


def _backward(causal, scale, needs, q, k, v, seqlens, o, lse, do):
    group = _Group(q, k)
    x, (q, k, v, o, do) = (q, k, v), (group.fold(q), wide(k), wide(v), group.fold(o), group.fold(do))
    p = _probabilities(group, q, k, lse, seqlens, causal, scale)
    dv = p.mT @ do if needs[2] else None
    ds = mul_(sub_(do @ v.mT, _row_dot(do, o)), p) if needs[0] or needs[1] else None
    dq = (ds @ k).mul_(scale) if needs[0] else None
    dk = (ds.mT @ q).mul_(scale) if needs[1] else None
    return _results(x, (dq, dk, dv), needs)


def _dual_forward(causal, scale, q, k, v, seqlens, q_t, k_t, v_t):
    group = _Group(q, k)
    like, (q, k, v, q_t, k_t, v_t) = q, (group.fold(q), wide(k), wide(v), group.fold(q_t), wide(k_t), wide(v_t))
    p, row_max, row_sum = _unnormalised(_scores(group, q, k, seqlens, causal, scale))
    o = (p @ v) / row_sum
    mu, o_t = _tangent(p, _scores_t(q, k, q_t, k_t, scale), v, v_t, o, row_sum)
    mu = torch.zeros_like(row_sum) if mu is None else mu
    return group.unfold(o, like), group.unfold(o_t, like), _lse(group, row_max, row_sum), group.rows_of(mu)


def _dual_backward(causal, scale, needs, needs_t, q, k, v, seqlens, q_t, k_t, v_t, o, o_t, lse, mu, a, b):
    # a, b: cotangents of o, o_t
    group = _Group(q, k)
    x, (q, k, v, q_t, k_t, v_t) = (q, k, v), (group.fold(q), wide(k), wide(v), group.fold(q_t), wide(k_t), wide(v_t))
    o, o_t, a, b = (group.fold(t) for t in (o, o_t, a, b))
    p = _probabilities(group, q, k, lse, seqlens, causal, scale)
    # P_t = P * (S_t - mu)
    s_t = _scores_t(q, k, q_t, k_t, scale) if any(needs) else None
    p_t = None if s_t is None else mul_(sub_(s_t, group.column(mu)), p)
    x_bar = x_t_bar = (None, None, None)
    ds, ds_t = _d_scores(p, p_t, v, v_t, o, o_t, a, b, needs, needs_t)
    if any(needs):
        x_bar = _d_primals(p, p_t, ds, ds_t, q, k, q_t, k_t, a, b, scale, needs)
    if any(needs_t):
        x_t_bar = _d_tangents(p, ds, q, k, b, scale, needs_t)
    return (*_results(x, x_bar, needs), *_results(x, x_t_bar, needs_t))


def _double_backward(causal, scale, needs, q, k, v, seqlens, q_t, k_t, v_t, o, lse, b):
    group = _Group(q, k)
    x, (q, k, v, q_t, k_t, v_t) = (q, k, v), (group.fold(q), wide(k), wide(v), group.fold(q_t), wide(k_t), wide(v_t))
    o, b = group.fold(o), group.fold(b)
    p = _probabilities(group, q, k, lse, seqlens, causal, scale)
    s_t = _scores_t(q, k, q_t, k_t, scale)
    if s_t is None:
        mu, o_t, p_t = None, p @ v_t, None
    else:
        mu, o_t = _tangent(p, s_t.clone() if any(needs) else s_t, v, v_t, o, None)
        p_t = mul_(sub_(s_t, mu), p) if any(needs) else None
    x_bar = (None, None, None)
    if any(needs):
        ds, ds_t = _d_scores(p, p_t, v, v_t, o, o_t, None, b, needs, (False,) * 3)
        x_bar = _d_primals(p, p_t, ds, ds_t, q, k, q_t, k_t, None, b, scale, needs)
    return (*_results(x, x_bar, needs), group.unfold(o_t, x[0]))


def _tangent(p: Tensor, s_t: Tensor | None, v: Tensor, v_t: Tensor | None, o: Tensor,
             row_sum: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """mu = rowsum(P * S_t) and o_t = (P * S_t) v - mu * o + P v_t; P = p / row_sum. Writes over ``s_t``."""
    if s_t is None:
        o_t = p @ v_t
        return None, o_t if row_sum is None else o_t / row_sum
    ps_t = mul_(s_t, p)
    mu = ps_t.sum(-1, keepdim=True)
    o_t = ps_t @ v
    if v_t is not None:
        o_t = o_t + p @ v_t
    if row_sum is not None:
        mu, o_t = mu / row_sum, o_t / row_sum
    return mu, o_t - mu * o


def _d_scores(p, p_t, v, v_t, o, o_t, a, b, needs, needs_t) -> tuple[Tensor | None, Tensor | None]:
    """dS = P * (dP - D) and dS_t = P_t * (dP - D) + P * (dP_t - D_t)."""
    ds = ds_t = None
    if b is not None and any((*needs[:2], *needs_t[:2])):
        # dP - D, with dP = b v^T, D = rowsum(b * o)
        dp = sub_(b @ v.mT, _row_dot(b, o))
        if p_t is not None and any(needs[:2]):
            ds_t = p_t * dp
        ds = mul_(dp, p)
    if any(needs[:2]):
        # dP_t = a v^T + b v_t^T,  D_t = rowsum(a * o + b * o_t)
        dp_t = add(None if a is None else a @ v.mT, None if b is None or v_t is None else b @ v_t.mT)
        d_t = add(None if a is None else _row_dot(a, o), None if b is None else _row_dot(b, o_t))
        if d_t is not None:
            ds_t = add(ds_t, -(p * d_t) if dp_t is None else mul_(sub_(dp_t, d_t), p))
    return ds, ds_t


def _d_primals(p, p_t, ds, ds_t, q, k, q_t, k_t, a, b, scale, needs):
    dq = dk = dv = None
    if needs[0]:
        dq = add(_product(ds_t, k, scale), _product(ds, k_t, scale))
    if needs[1]:
        dk = add(_product(_mT(ds_t), q, scale), _product(_mT(ds), q_t, scale))
    if needs[2]:
        dv = add(_product(_mT(p_t), b), _product(p.mT, a))
    return dq, dk, dv


def _d_tangents(p, ds, q, k, b, scale, needs_t):
    """An ordinary backward with b in the place of do."""
    return (_product(ds, k, scale) if needs_t[0] else None, _product(_mT(ds), q, scale) if needs_t[1] else None,
            _product(p.mT, b) if needs_t[2] else None)


class _Group:
    """Lays the query heads that share a key head one below the other, and back."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.batch, self.heads, self.rows, _ = q.shape
        self.kv_heads = k.shape[1]
        self.size = self.heads // self.kv_heads

    def fold(self, t: Tensor | None) -> Tensor | None:
        """[B, Hq, Sq, d] -> [B, Hkv, G * Sq, d]."""
        if t is None:
            return None
        return wide(t if self.size == 1 else t.reshape(self.batch, self.kv_heads, self.size * self.rows, t.shape[-1]))

    def unfold(self, t: Tensor, like: Tensor) -> Tensor:
        return t.reshape(self.batch, self.heads, self.rows, t.shape[-1]).to(like.dtype)

    def column(self, rows: Tensor) -> Tensor:
        """[B, Hq, Sq] -> [B, Hkv, G * Sq, 1]."""
        return rows.reshape(self.batch, self.kv_heads, self.size * self.rows, 1)

    def rows_of(self, column: Tensor) -> Tensor:
        return column.reshape(self.batch, self.heads, self.rows)


def _by_samples(kernel: Callable[..., tuple[Tensor | None, ...]], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Runs ``kernel`` on as many samples at a time as keep the score matrices small."""
    q, k = tensors[:2]
    budget = SCORES.get(q.device.type, SCORES_ELSEWHERE)
    return by_samples(kernel, budget // max(1, q.shape[1] * q.shape[2] * k.shape[2]), *tensors)


def _scores(group: _Group, q: Tensor, k: Tensor, seqlens: Tensor | None, causal: bool, scale: float) -> Tensor:
    s = (q * scale) @ k.mT
    hidden = _hidden(group.rows, k.shape[-2], seqlens, causal, q.device)
    if hidden is None:
        return s
    s = s.unflatten(2, (group.size, group.rows))
    return (s.masked_fill_(hidden, -torch.inf) if seqlens is None else s.masked_fill(hidden, -torch.inf)).flatten(2, 3)


def _unnormalised(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p = exp(s - max), its row maximum and its row sum; a row that sees no key has the sum infinity and p = 0."""
    empty_row = s.new_zeros(*s.shape[:-1], 1)
    row_max = s.amax(-1, keepdim=True) if s.shape[-1] else empty_row - torch.inf
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    p = sub_(s, row_max).exp_()
    row_sum = p.sum(-1, keepdim=True)
    return p, row_max, row_sum.masked_fill(row_sum == 0, torch.inf)


def _lse(group: _Group, row_max: Tensor, row_sum: Tensor) -> Tensor:
    return group.rows_of(row_max + row_sum.log())


def _probabilities(group: _Group, q: Tensor, k: Tensor, lse: Tensor, seqlens: Tensor | None, causal: bool,
                   scale: float) -> Tensor:
    return sub_(_scores(group, q, k, seqlens, causal, scale), group.column(lse)).exp_()


def _scores_t(q: Tensor, k: Tensor, q_t: Tensor | None, k_t: Tensor | None, scale: float) -> Tensor | None:
    """S_t = scale * (q_t k^T + q k_t^T)."""
    return add(None if q_t is None else (q_t * scale) @ k.mT, None if k_t is None else (q * scale) @ k_t.mT)


def _hidden(rows: int, keys: int, seqlens: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """Which keys a query does not see: bool, broadcastable to [B, Hkv, G, Sq, Sk]."""
    i = torch.arange(rows, device=device).unsqueeze(-1)
    j = torch.arange(keys, device=device)
    hidden = j > i + (keys - rows) if causal else None
    if seqlens is not None:
        valid = seqlens.view(-1, 1, 1, 1, 1)
        padding = j >= valid
        if rows == keys:
            padding = padding | (i >= valid)
        hidden = padding if hidden is None else hidden | padding
    return hidden


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _mT(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.mT


def _product(a: Tensor | None, b: Tensor | None, scale: float = 1.0) -> Tensor | None:
    if a is None or b is None:
        return None
    return a @ b if scale == 1.0 else (a @ b).mul_(scale)


def _results(x, x_bar, needs):
    """The cotangents that are needed, in the shapes and dtypes of ``x``; a known zero as zeros."""
    return tuple(cast(None if g is None else g.reshape(t.shape), t) if need else None
                 for t, g, need in zip(x, x_bar, needs, strict=True))
