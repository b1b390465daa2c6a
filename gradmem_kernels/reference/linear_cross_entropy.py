"""Linear cross-entropy kernels: the logits z = h W^T + c of a chunk of rows at a time. Derivation and names:
docs/linear_cross_entropy.md."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem_kernels.reference.common import add, add_, addmm_, cast, mul_, rows, sub_, sum_rows, wide

#: Elements of one chunk of logits. Kernels hold at most three tensors of that size.
LOGITS = 2**24


def forward(x, aux, *, ignore_index):
    loss, _, (lse, _) = dual_forward(x, aux, (None,) * 3, ignore_index=ignore_index)
    return loss, (lse,)


def backward(x, aux, y, saved, y_bar, needs, *, ignore_index):
    none = (None,) * 3
    x_bar, _ = dual_backward(x, aux, none, y, (None,), (*saved, None), y_bar, (None,), needs, (False,) * 3,
                             ignore_index=ignore_index)
    return x_bar


def dual_forward(x, aux, x_t, *, ignore_index):
    label, share = _targets(aux[0], ignore_index)
    losses, losses_t, lses, mus = [], [], [], []
    for _, _, z, z_t, index in _chunks(x, x_t, label):
        z_max = z.amax(-1, keepdim=True)
        z_label = z.gather(-1, index)
        p = z.sub_(z_max).exp_()
        p_sum = p.sum(-1, keepdim=True)
        lses.append(z_max + p_sum.log())
        losses.append(lses[-1] - z_label)
        if z_t is not None:
            # row_t = mu - z_t[label],  mu = sum(P * z_t)
            mus.append(mul_(p, z_t).sum(-1, keepdim=True) / p_sum)
            losses_t.append(mus[-1] - z_t.gather(-1, index))
    loss, loss_t = (None if t is None else _mean(t, share) for t in (_join(losses), _join(losses_t)))
    return (loss,), (loss_t,), (_join(lses), _join(mus))


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, ignore_index):
    lse, mu = saved
    label, share = _targets(aux[0], ignore_index)
    # cotangents of the rows' losses and of their tangents
    a, b = (None if g is None else (share.to(g.dtype) * g.unsqueeze(-1)).view(-1, 1) for g in (*y_bar, *y_t_bar))
    if b is None or not any(needs):
        x_t = (None,) * 3
    w, w_t = wide(x[1]), wide(x_t[1])
    uses_dz_t = b is not None and (any(needs_t) or (needs[0] and w_t is not None) or (needs[1] and x_t[0] is not None))

    dh, dh_t = [], []
    dw = dw_t = dc = dc_t = None
    for h, h_t, z, z_t, index, lse_, mu_, a_, b_ in _chunks(x, x_t, label, lse, mu, a, b):
        p = sub_(z, lse_).exp_()
        # P_t = P * (z_t - mu)
        p_t = None if z_t is None else mul_(sub_(z_t, mu_), p)
        # dz_t = b * (P - 1[label]),  dz = a * (P - 1[label]) + b * P_t
        dz_t = _less_label(p * b_, index, b_) if uses_dz_t else None
        dz = None if a_ is None else _less_label(mul_(p, a_), index, a_)
        if p_t is not None:
            dz = add_(dz, mul_(p_t, b_))

        if needs[0]:
            dh.append(addmm_(addmm_(None, dz, w), dz_t, w_t))
        if needs[1]:
            dw = _outer(_outer(dw, dz, h), dz_t, h_t)
        if needs[2]:
            dc = add(dc, sum_rows(dz))
        if needs_t[0]:
            dh_t.append(addmm_(None, dz_t, w))
        if needs_t[1]:
            dw_t = _outer(dw_t, dz_t, h)
        if needs_t[2]:
            dc_t = add(dc_t, sum_rows(dz_t))
    return (_select(x, (_join(dh), dw, dc), needs), _select(x, (_join(dh_t), dw_t, dc_t), needs_t))


def _chunks(x, x_t, *columns: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """For a chunk of rows at a time: h, h_t, z, z_t and the chunks of ``columns``, [B * S, 1] each."""
    (_, weight, bias), (_, weight_t, bias_t) = map(wide, x), map(wide, x_t)
    size = max(1, LOGITS // weight.shape[0])
    parts = [repeat(None) if t is None else t.split(size) for t in (rows(x[0]), rows(x_t[0]), *columns)]
    for h, h_t, *rest in zip(*parts, strict=False):
        h, h_t = wide(h), wide(h_t)
        z = F.linear(h, weight, bias)
        # z_t = h_t W^T + h W_t^T + c_t
        z_t = addmm_(addmm_(None, h_t, weight.mT), h, None if weight_t is None else weight_t.mT)
        if bias_t is not None:
            z_t = add_(bias_t.expand_as(z).clone(), z_t)
        yield h, h_t, z, z_t, *rest


def _targets(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Column of each row's label, [B * S, 1] (any for an ignored row), and its share of its sample's loss, [B, S]."""
    counted = labels != ignore_index
    share = counted / counted.sum(-1, keepdim=True).clamp(min=1).to(torch.float64)
    return labels.where(counted, 0).reshape(-1, 1), share


def _mean(row: Tensor, share: Tensor) -> Tensor:
    # an ignored row adds nothing, even one that is not finite
    return (row.view(share.shape).masked_fill(share == 0, 0) * share.to(row.dtype)).sum(-1)


def _less_label(g: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """g - scale * 1[label], in the place of ``g``, which depends on ``scale``, and so on the labels."""
    return g.scatter_add_(-1, index, -scale)


def _outer(total: Tensor | None, dz: Tensor | None, h: Tensor | None) -> Tensor | None:
    """total + dz^T h."""
    return addmm_(total, None if dz is None else dz.mT, h)


def _join(parts: list[Tensor | None]) -> Tensor | None:
    if not parts or parts[0] is None:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _select(x, x_bar, needs):
    """The gradients that are needed, in the shapes and dtypes of ``x``."""
    return tuple(cast(None if g is None else g.view(t.shape), t) if need else None
                 for t, g, need in zip(x, x_bar, needs, strict=True))
