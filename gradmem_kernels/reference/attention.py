"""Attention kernels, with the S x S matrices written out. Derivation and names: docs/attention.md.

The query heads of a group are laid one below the other, so that grouped-query attention is plain matrix products:
q is [B, Hkv, G * Sq, d], the scores are [B, Hkv, G * Sq, Sk].
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_kernels.reference.common import add, mul_, sub_, wide


def forward(x, aux, *, causal, scale):
    q, k, v = x
    group = _Group(q, k)
    s = _scores(group, q, k, aux[0], causal, scale)
    # a row that sees no key has the maximum -inf
    row_max = s.amax(-1, keepdim=True).nan_to_num_(neginf=0.0) if k.shape[-2] else s.new_zeros(*s.shape[:-1], 1)
    p = sub_(s, row_max).exp_()
    row_sum = p.sum(-1, keepdim=True)
    empty = row_sum == 0
    o = (p @ wide(v)) / row_sum.masked_fill(empty, 1.0)
    lse = (row_max + row_sum.log()).masked_fill(empty, torch.inf)
    return (group.unfold(o).to(q.dtype),), (group.unfold(lse).squeeze(-1),)


def backward(x, aux, y, saved, y_bar, needs, *, causal, scale):
    (q, k, v), (o,), (lse,), (do,) = x, y, saved, y_bar
    group = _Group(q, k)
    p = _probabilities(group, q, k, lse, aux[0], causal, scale)
    do = group.fold(do)
    dv = p.mT @ do if needs[2] else None
    dq = dk = None
    if needs[0] or needs[1]:
        ds = _d_scores(p, do @ wide(v).mT, _row_dot(do, group.fold(o)))
        dq = ds @ wide(k) * scale if needs[0] else None
        dk = ds.mT @ group.fold(q) * scale if needs[1] else None
    return _cast(x, (None if dq is None else group.unfold(dq), dk, dv))


def dual_forward(x, aux, x_t, *, causal, scale):
    (q, k, v), (q_t, k_t, v_t) = x, x_t
    (o,), (lse,) = forward(x, aux, causal=causal, scale=scale)
    group = _Group(q, k)
    p = _probabilities(group, q, k, lse, aux[0], causal, scale)
    s_t = _scores_t(group, q, k, q_t, k_t, scale)
    if s_t is None:
        o_t, mu = p @ wide(v_t), torch.zeros_like(lse)
    else:
        # o_t = (P * S_t) v - mu * o + P v_t
        ps_t = mul_(s_t, p)
        mu = ps_t.sum(-1, keepdim=True)
        o_t = sub_(ps_t @ wide(v), mu * group.fold(o))
        if v_t is not None:
            o_t = o_t + p @ wide(v_t)
        mu = group.unfold(mu).squeeze(-1)
    return (o,), (group.unfold(o_t).to(q.dtype),), (lse, mu)


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, causal, scale):
    (q, k, v), (q_t, k_t, v_t), (lse, mu) = x, x_t, saved
    group = _Group(q, k)
    # a, b: cotangents of o, o_t
    o, o_t, a, b = (group.fold(t) for t in (*y, *y_t, *y_bar, *y_t_bar))
    p = _probabilities(group, q, k, lse, aux[0], causal, scale)
    q, k, v, q_t, k_t, v_t = group.fold(q), wide(k), wide(v), group.fold(q_t), wide(k_t), wide(v_t)

    ds = ds_t = p_t = None
    if any(needs):
        s_t = _scores_t(group, x[0], k, x_t[0], k_t, scale)
        # P_t = P * (S_t - mu)
        p_t = None if s_t is None else mul_(sub_(s_t, group.fold(mu.unsqueeze(-1))), p)
    if b is not None and any(needs[:2] + needs_t[:2]):
        # dP - D, then dS = P * (dP - D)
        dp = sub_(b @ v.mT, _row_dot(b, o))
        # dS_t = P_t * (dP - D) + P * (dP_t - D_t)
        ds_t = None if p_t is None or not any(needs[:2]) else p_t * dp
        ds = mul_(dp, p)
    if any(needs[:2]):
        dp_t = add(None if a is None else a @ v.mT, None if b is None or v_t is None else b @ v_t.mT)
        d_t = add(None if a is None else _row_dot(a, o), None if b is None else _row_dot(b, o_t))
        if dp_t is not None:
            ds_t = add(ds_t, _d_scores(p, dp_t, d_t))
        elif d_t is not None:
            ds_t = add(ds_t, -(p * d_t))

    zero = [torch.zeros_like(t) for t in (q, k, v)] if a is None or b is None else (None, None, None)
    dq = dk = dv = dq_t = dk_t = dv_t = None
    if needs[0]:
        dq = add(_product(ds_t, k, scale), _product(ds, k_t, scale))
    if needs[1]:
        dk = add(_product(_mT(ds_t), q, scale), _product(_mT(ds), q_t, scale))
    if needs[2]:
        dv = add(_product(_mT(p_t), b), _product(p.mT, a))
    if needs_t[0]:
        dq_t = _product(ds, k, scale)
    if needs_t[1]:
        dk_t = _product(_mT(ds), q, scale)
    if needs_t[2]:
        dv_t = _product(p.mT, b)
    x_bar, x_t_bar = ([z if need and g is None else g for g, need, z in zip(gs, flags, zero, strict=True)]
                      for gs, flags in (((dq, dk, dv), needs), ((dq_t, dk_t, dv_t), needs_t)))
    return (_cast(x, (group.unfold(x_bar[0]), *x_bar[1:])), _cast(x, (group.unfold(x_t_bar[0]), *x_t_bar[1:])))


class _Group:
    """Lays the query heads that share a key head one below the other, and back."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.batch, self.heads, self.rows, _ = q.shape
        self.kv_heads = k.shape[1]
        self.size = self.heads // self.kv_heads

    def fold(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return wide(t.reshape(self.batch, self.kv_heads, self.size * self.rows, t.shape[-1]))

    def unfold(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else t.reshape(self.batch, self.heads, self.rows, t.shape[-1])


def _scores(group: _Group, q: Tensor, k: Tensor, seqlens: Tensor | None, causal: bool, scale: float) -> Tensor:
    s = (group.fold(q) * scale) @ wide(k).mT
    hidden = _hidden(group.rows, k.shape[-2], seqlens, causal, q.device)
    if hidden is not None:
        s = s.unflatten(2, (group.size, group.rows))
        s = (s.masked_fill_(hidden, -torch.inf) if seqlens is None else s.masked_fill(hidden, -torch.inf)).flatten(2, 3)
    return s


def _probabilities(group: _Group, q: Tensor, k: Tensor, lse: Tensor, seqlens: Tensor | None, causal: bool,
                   scale: float) -> Tensor:
    return sub_(_scores(group, q, k, seqlens, causal, scale), group.fold(lse.unsqueeze(-1))).exp_()


def _scores_t(group: _Group, q: Tensor, k: Tensor, q_t: Tensor | None, k_t: Tensor | None,
              scale: float) -> Tensor | None:
    """S_t = scale * (q_t k^T + q k_t^T)."""
    return add(None if q_t is None else (group.fold(q_t) * scale) @ wide(k).mT,
               None if k_t is None else (group.fold(q) * scale) @ wide(k_t).mT)


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


def _d_scores(p: Tensor, dp: Tensor, row_dot: Tensor) -> Tensor:
    """dS = P * (dP - D)."""
    return mul_(sub_(dp, row_dot), p)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _mT(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.mT


def _product(a: Tensor | None, b: Tensor | None, scale: float = 1.0) -> Tensor | None:
    if a is None or b is None:
        return None
    return a @ b if scale == 1.0 else (a @ b).mul_(scale)


def _cast(x, gradients):
    return tuple(None if g is None else g.to(t.dtype) for t, g in zip(x, gradients, strict=True))
