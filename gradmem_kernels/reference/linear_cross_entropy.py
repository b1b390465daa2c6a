"""Linear cross-entropy kernels: sweeps over the rows that hold the logits z = h W^T + c of one chunk of them at a time.
Derivation and names: docs/linear_cross_entropy.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradmem_kernels.autograd import Flags, Tensors
from gradmem_kernels.checks import Checker, check_values
from gradmem_kernels.reference.common import add_, addcmul_, addmm_, cast, is_wrapped, mul_, rows, sub_, wide

HALF = (torch.float16, torch.bfloat16)
NONE, NO = (None,) * 3, (False,) * 3


def forward(x, aux, *, early=NO, **options):
    """``early``: the inputs whose cotangents the sweep computes already, kept behind ``lse``. Those of weight and bias
    are for the announced cotangent ``aux[1]``, hidden's is for a cotangent of 1."""
    sweep = _Sweep(x, NONE, aux[0], aux[1], None, early, NO, unit=True, **options)
    loss, _, lse, _ = _forward_sweep(sweep)
    return (loss,), (lse, *sweep.early(early + NO))


def backward(x, aux, y, saved, y_bar, needs, *, early=NO, **options):
    lse, *known = saved
    known, rest = _by_flags(known, early), _less(needs, early)
    if early[0] and needs[0]:
        known[0] = known[0] * wide(y_bar[0])[:, None, None]
    if needs[1:] != rest[1:]:
        known[1:] = _scaled(known[1:], _factor(y_bar, aux[1:2], by_sample=False))
    x_bar = _backward_sweep(lse, None, x, NONE, aux[0], *y_bar, None, rest, NO, **options)
    return _select(x, known, x_bar[:3], needs)


def dual_forward(x, aux, x_t, *, early=NO + NO, **options):
    """``early``: the inputs and tangents whose cotangents, for those announced in ``aux[1:]``, the sweep computes
    already, kept behind ``mu``."""
    sweep = _Sweep(x, x_t, *aux, early[:3], early[3:], **options)
    loss, loss_t, lse, mu = _forward_sweep(sweep)
    return (loss,), (loss_t,), (lse, mu, *sweep.early(early))


def dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, *, early=NO + NO, **options):
    lse, mu, *known = saved
    needs = needs + needs_t
    known, rest = _by_flags(known, early), _less(needs, early)
    if needs != rest:
        bars = y_bar + y_t_bar, aux[1:]
        # rows know their own sample's cotangents only, sums over rows those of all samples
        if needs[::3] != rest[::3]:
            known[::3] = _scaled(known[::3], _factor(*bars, by_sample=True).view(-1, 1, 1))
        if needs[1:3] != rest[1:3]:
            known[1:3] = _scaled(known[1:3], _factor(*bars, by_sample=False))
    if y_t_bar[0] is None or not any(rest[:3]):
        x_t = NONE
    bars = _backward_sweep(lse, mu, x, x_t, aux[0], *y_bar, *y_t_bar, rest[:3], rest[3:], **options)
    bars = _select(x + x, known, bars, needs)
    return bars[:3], bars[3:]


def double_backward(x, aux, x_t, y, saved, y_bar, needs, **options):
    """In one sweep: the cotangent of loss_t is there before it."""
    sweep = _Sweep(x, x_t, aux[0], None, *y_bar, needs, NO, **options)
    _, loss_t, _, _ = _forward_sweep(sweep)
    return _select(x, NONE, sweep.totals()[:3], needs), (loss_t,)


def bytes_per_row(weight: Tensor, tangents: bool) -> int:
    """The most that a sweep holds at once of tensors as wide as the logits, for each row: z and z_t, in whose place all
    others are computed, and where products take half precision, copies in that."""
    size = wide(weight.new_empty(0)).element_size() + (weight.element_size() if weight.dtype in HALF else 0)
    return weight.shape[0] * size * (2 if tangents else 1)


def _forward_sweep(sweep):
    """Loss, loss_t, lse and mu."""
    stats = [_forward_chunk(sweep, part) for part in sweep.parts]
    row, row_t, lse, mu = (sweep.put(column) for column in zip(*stats, strict=True))
    return _mean(row, sweep.shares), _mean(row_t, sweep.shares), lse, mu


def _forward_chunk(sweep, part):
    chunk = sweep.logits(part)
    stats, bars = sweep.row_kernels.forward(chunk.z, chunk.z_t, part.label, *sweep.bars(part), sweep.wanted)
    if sweep.wanted:
        sweep.add(part, chunk, *bars)
    return stats


def _backward_sweep(lse, mu, x, x_t, labels, a, b, needs, needs_t, **options):
    """The cotangents that are needed, from the rows' statistics."""
    if not any(needs + needs_t) or (a is None and b is None):
        return NONE + NONE
    sweep = _Sweep(x, x_t, labels, a, b, needs, needs_t, **options)
    if sweep.wanted:
        for part in sweep.parts:
            _backward_chunk(sweep, part, lse, mu)
    return sweep.totals()


def _backward_chunk(sweep, part, lse, mu):
    chunk = sweep.logits(part)
    stats = lse[part.where], None if chunk.z_t is None else mu[part.where]
    sweep.add(part, chunk, *sweep.row_kernels.backward(chunk.z, chunk.z_t, part.label, *stats, *sweep.bars(part)))


class RowKernels:
    """What a sweep does to rows of logits ``z`` and their tangents ``z_t``, ``[m, V]``, in their place.

    ``label``, statistics and the cotangents ``a`` and ``b`` of each row's loss and loss_t are ``[m, 1]``; ``None`` is a
    known zero, but for ``a`` where there is no ``b``: 1. With these, the logits' cotangents are ``dz, dz_t``.
    """

    def forward(self, z, z_t, label, a, b, wanted):
        """``(row, row_t, lse, mu), (dz, dz_t)``: each row's loss and its tangent; cotangents if they are wanted."""
        z_max, z_label = z.amax(-1, keepdim=True), z.gather(-1, label)
        p = z.sub_(z_max).exp_()
        p_sum = p.sum(-1, keepdim=True)
        lse = z_max + p_sum.log()
        mu = row_t = p_t = None
        if z_t is not None or wanted:
            p.div_(p_sum)
        if z_t is not None:
            # row_t = mu - z_t[label],  mu = sum(P * z_t),  P_t = P * (z_t - mu)
            z_t_label = z_t.gather(-1, label)
            p_t = mul_(z_t, p)
            mu = p_t.sum(-1, keepdim=True)
            row_t = mu - z_t_label
            if wanted and b is not None:
                p_t = addcmul_(p_t, p, -mu)
        return (lse - z_label, row_t, lse, mu), _logits_bars(p, p_t, label, a, b) if wanted else (None, None)

    def backward(self, z, z_t, label, lse, mu, a, b):
        """``dz, dz_t``, from the rows' statistics."""
        p = sub_(z, lse).exp_()
        return _logits_bars(p, None if z_t is None or b is None else mul_(sub_(z_t, mu), p), label, a, b)


def _logits_bars(p, p_t, label, a, b):
    """``dz, dz_t`` in the place of P and P_t."""
    # P - 1[label]
    g = _less_one(p, label)
    if b is None:
        return g, None
    if p_t is None:
        return None, g
    # dz = a * (P - 1[label]) + b * P_t
    dz = mul_(p_t, b)
    return dz if a is None else addcmul_(dz, g, a), g


class _Part(NamedTuple):
    """Some of the ``B * S`` rows."""

    where: Tensor | slice
    #: [m, 1]: 0 for a row that does not count, and its share of its sample's loss.
    label: Tensor
    share: Tensor
    #: [m, 1], which rows do not count; None if all do.
    ignored: Tensor | None

    def take(self, t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """These rows of ``t``, zeros where they do not count, whatever is there."""
        if t is None:
            return None
        t = t[self.where].to(dtype)
        return t if self.ignored is None else t.masked_fill(self.ignored, 0)


class _Chunk(NamedTuple):
    """The logits of a part; ``pair`` holds both, if both are views of it."""

    h: Tensor
    h_t: Tensor | None
    z: Tensor
    z_t: Tensor | None
    pair: Tensor | None


class _Sweep:
    """What a sweep reads, and the cotangents of ``x`` and ``x_t`` that add up in it.

    ``a`` and ``b`` are the cotangents of loss and loss_t, [B]; ``unit``: hidden's cotangent is for ``a = 1``.
    """

    def __init__(self, x, x_t, labels, a, b, needs, needs_t, *, ignore_index, max_counted, budget, unit=False,
                 row_kernels=RowKernels()):  # noqa: B008 - it has no state
        self.row_kernels = row_kernels
        self.x, self.unit, self.needs, self.needs_t = x, unit, needs, NO if b is None else needs_t
        self.wanted = any(self.needs + self.needs_t)
        dtype = _product_dtype(x[1])
        self.w, self.w_t = (None if t is None else t.to(dtype) for t in (x[1], x_t[1]))
        self.h, self.h_t, self.c, self.c_t = rows(x[0]), rows(x_t[0]), wide(x[2]), wide(x_t[2])
        self.a, self.b = (None if g is None else wide(g)[:, None].expand(labels.shape).reshape(-1, 1) for g in (a, b))
        tangents = any(t is not None for t in x_t)
        size = max(1, budget // bytes_per_row(self.w, tangents))
        self.parts, self.shares = _parts(labels, ignore_index, max_counted, size)
        self.dh, self.dh_t = [], []
        self.dw = self.dc = self.dw_t = self.dc_t = None

    def logits(self, part: _Part) -> _Chunk:
        h, h_t = (part.take(t, self.w.dtype) for t in (self.h, self.h_t))
        z_t = pair = None
        if h_t is None:
            z = _mm(h, self.w.mT)
        else:
            pair = _mm(torch.cat([h, h_t]), self.w.mT)
            z, z_t = pair[: len(h)], pair[len(h) :]
        chunk = _Chunk(h, h_t, z, z_t, pair)
        # z_t = h_t W^T + h W_t^T + c_t
        if self.w_t is not None:
            z_t = _add_mm(z_t, h, self.w_t.mT)
        if self.c_t is not None:
            z_t = self.c_t.expand(z.shape).clone() if z_t is None else add_(z_t, self.c_t)
        return chunk._replace(z=add_(z, self.c), z_t=z_t)

    def bars(self, part: _Part) -> tuple[Tensor | None, Tensor | None]:
        """``a`` and ``b`` of a part's rows."""
        return None if self.a is None else self.a[part.where], None if self.b is None else self.b[part.where]

    def add(self, part: _Part, chunk: _Chunk, dz: Tensor | None, dz_t: Tensor | None) -> None:
        """Adds a chunk, given what :class:`RowKernels` make of its logits.

        The logits' cotangents are ``r * dz`` and ``r_t * dz_t`` with one factor for each row, so that ``dz`` and
        ``dz_t``, which may be rounded to half precision, are free of the shares.
        """
        share = part.share.to(chunk.z.dtype)
        a, b = self.bars(part)
        r, r_t = share if a is None or b is not None else share * a, None if b is None else share * b
        pair = chunk.pair
        if dz is None or dz_t is None or is_wrapped(dz) or is_wrapped(dz_t):
            pair = None  # a wrapped result was not computed in the place of the logits
        self._add_bias(dz, r, dz_t, r_t)
        if pair is not None:
            pair = pair.to(self.w.dtype)
            dz_t, dz = pair[: len(chunk.z)], pair[len(chunk.z) :]
        else:
            dz_t, dz = (None if t is None else t.to(self.w.dtype) for t in (dz_t, dz))
        self._add_hidden(dz, share if self.unit else r, dz_t, r_t, pair)
        self._add_weight(dz, r, dz_t, r_t, pair, chunk.h, chunk.h_t)

    def _add_hidden(self, dz, r, dz_t, r_t, pair):
        # dh = r * dz W + r_t * dz_t W_t,  dh_t = r_t * dz_t W
        hidden, hidden_t = self.needs[0], self.needs_t[0]
        if hidden and hidden_t and pair is not None:
            dh_t, dh = _mm(pair, self.w).tensor_split(2)
        else:
            dh_t, dh = _mm(dz_t, self.w) if hidden_t else None, _mm(dz, self.w) if hidden else None
        if hidden_t:
            self.dh_t.append(mul_(dh_t, r_t))
        if hidden:
            self.dh.append(add_(mul_(dh, r), None if self.w_t is None or dz_t is None else _mm(dz_t, self.w_t) * r_t))

    def _add_weight(self, dz, r, dz_t, r_t, pair, h, h_t):
        # dW = sum dz^T (r * h) + dz_t^T (r_t * h_t),  dW_t = sum dz_t^T (r_t * h)
        weight, weight_t = self.needs[1], self.needs_t[1]
        if weight and pair is not None:
            self.dw = _add_mm(self.dw, pair.mT, torch.cat([h_t * r_t, h * r]).to(self.w.dtype))
        elif weight:
            self.dw = _add_mm(self.dw, dz.mT, (h * r).to(self.w.dtype))
            if h_t is not None and dz_t is not None:
                self.dw = _add_mm(self.dw, dz_t.mT, (h_t * r_t).to(self.w.dtype))
        if weight_t:
            self.dw_t = _add_mm(self.dw_t, dz_t.mT, (h * r_t).to(self.w.dtype))

    def _add_bias(self, dz, r, dz_t, r_t):
        # dc = sum r * dz,  dc_t = sum r_t * dz_t
        if self.needs[2]:
            self.dc = add_(self.dc, dz.mT @ r[:, 0])
        if self.needs_t[2]:
            self.dc_t = add_(self.dc_t, dz_t.mT @ r_t[:, 0])

    def put(self, column):
        """The parts' rows in their places among all rows, zeros elsewhere."""
        if not column or column[0] is None:
            return None
        joined = column[0] if len(column) == 1 else torch.cat(column)
        where = [part.where for part in self.parts]
        if isinstance(where[0], slice):
            return joined
        return joined.new_zeros(self.shares.numel(), joined.shape[1]).index_copy(0, torch.cat(where), joined)

    def totals(self) -> Tensors:
        """The cotangents of ``x`` and ``x_t``, in float32 or wider; None where they are not needed, or zero."""
        x_bar = self.put(self.dh), self.dw, self.dc, self.put(self.dh_t), self.dw_t, self.dc_t
        return tuple(None if g is None else g.view(t.shape) for t, g in zip(self.x + self.x, x_bar, strict=True))

    def early(self, flags: Flags) -> Tensors:
        """The flagged ones of them, to be kept; zeros too."""
        return tuple(wide(torch.zeros_like(t)) if g is None else g
                     for t, g, flag in zip(self.x + self.x, self.totals(), flags, strict=True) if flag)


def _parts(labels: Tensor, ignore_index: int, max_counted: int | None, size: int) -> tuple[list[_Part], Tensor]:
    """The rows that take logits, ``size`` at a time, and each position's share of its sample's loss, [B, S].

    On a CPU these are the rows that count. Elsewhere nobody can say how many those are without waiting for the device:
    they are the first ``max_counted`` rows in an order in which those that count come first, or else all rows.
    """
    counted = labels != ignore_index
    number = counted.sum(-1, keepdim=True)
    shares = counted / number.clamp(min=1).to(torch.float64)
    counted, label, share = (t.reshape(-1, 1) for t in (counted, labels.where(counted, 0), shares))
    total = labels.numel()
    where: Tensor | None = None
    ignored: Tensor | None = ~counted
    if _may_wait(labels):
        where, ignored = counted[:, 0].nonzero()[:, 0], None
        where = None if where.numel() == total else where
    elif max_counted is not None and max_counted < total and not is_wrapped(labels):
        where = counted[:, 0].logical_not().to(torch.uint8).argsort(stable=True)[:max_counted]
        # a wrong bound makes every loss NaN
        shares = shares.where(number.sum() <= max_counted, torch.nan)
        share = shares.reshape(-1, 1)
    count = total if where is None else where.numel()
    steps = [slice(i, i + size) for i in range(0, max(count, 1), size)]
    parts = steps if where is None else [where[step] for step in steps]
    return [_Part(w, label[w], share[w], None if ignored is None else ignored[w]) for w in parts], shares


def _may_wait(labels: Tensor) -> bool:
    """Whether the values of ``labels`` are at hand."""
    return labels.device.type == "cpu" and not is_wrapped(labels)


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What matrix products take: half precision on tensor cores, which add in float32; elsewhere no less than float32,
    because the sums would be rounded to half precision."""
    return weight.dtype if weight.dtype in HALF and _has_wide_sums(weight) else wide(weight.new_empty(0)).dtype


def _has_wide_sums(weight: Tensor) -> bool:
    """Whether PyTorch multiplies half precision into float32 there."""
    return weight.device.type == "cuda" and not is_wrapped(weight)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a b, in float32 for half precision."""
    if a.dtype not in HALF:
        return a @ b
    # vmap has no rule for out_dtype
    return wide(a) @ wide(b) if is_wrapped(a) or is_wrapped(b) else torch.mm(a, b, out_dtype=torch.float32)


def _add_mm(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in the place of ``total``, a temporary."""
    return addmm_(total, a, b) if a.dtype not in HALF else add_(total, _mm(a, b))


def _less_one(p: Tensor, label: Tensor) -> Tensor:
    """p - 1[label], in the place of ``p``."""
    minus = p.new_full((), -1.0).expand(label.shape)
    return p.scatter_add(-1, label, minus) if is_wrapped(label) else p.scatter_add_(-1, label, minus)


def _mean(row: Tensor | None, shares: Tensor) -> Tensor | None:
    if row is None:
        return None
    # in float64, as the shares are: the mean of many rows costs no digits
    return (row.view(shares.shape).masked_fill(shares == 0, 0) * shares).sum(-1).to(row.dtype)


def _factor(actual: Tensors, announced: Tensors, *, by_sample: bool) -> Tensor:
    """What announced cotangents ``[B]`` were multiplied by, for all samples or each by itself, to be the actual ones.

    What was made of them is linear in them, so that is all that the two may differ by. Where looking costs no wait,
    anything else raises, and elsewhere the result is NaN.
    """
    zero = torch.zeros_like(next(g for g in announced if g is not None))
    y, a = (torch.stack([zero if g is None else g for g in bars]) for bars in (actual, announced))
    dims = (0,) if by_sample else (0, 1)
    unit = a / a.abs().sum(dims, keepdim=True)
    factor = (y * unit).sum(dims, keepdim=True) / (a * unit).sum(dims, keepdim=True)
    factor = factor.masked_fill((a == 0).all(dims, keepdim=True), 0)
    wrong = ((y - factor * a).abs() > 16 * torch.finfo(a.dtype).eps * y.abs()).any(dims)
    if not is_wrapped(wrong) and check_values(wrong) and bool(wrong.any()):
        Checker("linear_cross_entropy").fail(
            "loss_bar", f"in the backward pass the announced cotangents, {a.flatten().tolist()}, or a multiple of them",
            y.flatten().tolist(), "announce those that will arrive, or none")
    return factor.sum(dims).masked_fill(wrong, torch.nan)


def _scaled(known: Sequence[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    return [None if g is None else g * factor for g in known]


def _by_flags(values: Sequence[Tensor], flags: Flags) -> list[Tensor | None]:
    rest = iter(values)
    return [next(rest) if flag else None for flag in flags]


def _less(needs: Flags, early: Flags) -> Flags:
    return tuple(need and not flag for need, flag in zip(needs, early, strict=True))


def _select(x, known, x_bar, needs):
    """The cotangents that are needed, known or not, in the shapes and dtypes of ``x``."""
    return tuple(cast(g if k is None else k, t) if need else None
                 for t, k, g, need in zip(x, known, x_bar, needs, strict=True))
