"""What a block of queries sees: its keys, what is added to their scores, and which weights dropout keeps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

#: Rows of a block, and elements of its score matrices: on a CPU, what stays in its cache.
ROWS = {"cpu": 64}
SCORES = {"cpu": 2**20}
ROWS_ELSEWHERE, SCORES_ELSEWHERE = 1024, 2**28

Rows = tuple[int, int] | None


class Settings(NamedTuple):
    """Everything about a call but q, k and v: auxiliary tensors and options, as attention() passes them."""

    seqlens: Tensor | None
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    dropout: float
    seed: int
    grad_rows: Rows
    tangent_rows: Rows


class Block(NamedTuple):
    """Some samples, some of their rows, and the keys that these may see."""

    samples: slice
    rows: slice
    keys: slice


class Scores(NamedTuple):
    """How a block's scores and weights come from q k^T."""

    scale: float
    softcap: float | None
    added: Tensor | None  # the bias, less infinity where a key is hidden
    factors: Tensor | None  # of the weights, by dropout


def scores_of(block: Block, q: Tensor, k: Tensor, settings: Settings) -> Scores:
    return Scores(settings.scale, settings.softcap, _added(block, q, k, settings), _factors(block, q, k, settings))


def cut(q: Tensor, k: Tensor, settings: Settings, touched: Rows) -> list[Block]:
    """Blocks that cover everything; for rows outside ``touched`` their keys inside it alone."""
    (batch, heads, queries, _), device = q.shape, q.device.type
    blocks = []
    for rows, inside in _cut_rows(queries, ROWS.get(device, ROWS_ELSEWHERE), touched):
        keys = _seen(rows, queries, k.shape[2], settings)
        if not inside:
            keys = slice(max(keys.start, touched[0]), min(keys.stop, touched[1]))
            if keys.start >= keys.stop:
                continue
        size = heads * (rows.stop - rows.start) * (keys.stop - keys.start)
        samples = max(1, SCORES.get(device, SCORES_ELSEWHERE) // max(1, size))
        blocks += [Block(slice(i, min(i + samples, batch)), rows, keys) for i in range(0, batch, samples)]
    return blocks


def _cut_rows(queries: int, most: int, touched: Rows) -> Iterator[tuple[slice, bool]]:
    """Blocks of at most so many rows, of about equal size, and whether they lie inside ``touched``."""
    start, stop = touched or (0, queries)
    for first, last in ((0, start), (start, stop), (stop, queries)):
        size = -(-(last - first) // max(1, -(-(last - first) // most)))
        for i in range(first, last, max(1, size)):
            yield slice(i, min(i + size, last)), first == start


def _seen(rows: slice, queries: int, keys: int, settings: Settings) -> slice:
    """The keys that these rows may see, as far as known without waiting for a device."""
    cu, cu_k = [0, queries], [0, keys]  # unless packed, one sequence
    if settings.cu_seqlens is not None:
        if settings.cu_seqlens.device.type != "cpu":
            return slice(0, keys)
        # the rows behind the last boundary as a sequence without keys
        cu = [*settings.cu_seqlens.tolist(), queries]
        cu_k = settings.cu_seqlens_k.tolist()
        cu_k.append(cu_k[-1])
    one, last = (min(bisect_right(cu, i) - 1, len(cu) - 2) for i in (rows.start, rows.stop - 1))
    start, stop = cu_k[one], cu_k[last + 1]
    # positions of the first and the last of the rows
    first_at, last_at = rows.start - cu[one + 1] + cu_k[one + 1], rows.stop - 1 - cu[last + 1] + cu_k[last + 1]
    if settings.window is not None:
        start = max(start, first_at - settings.window + 1)
    ahead = 1 if settings.causal else settings.window
    if ahead is not None:
        # sequences before the last are seen to their end
        stop = max(cu_k[last], min(stop, last_at + ahead))
    return slice(min(start, stop), stop)


def _added(block: Block, q: Tensor, k: Tensor, settings: Settings) -> Tensor | None:
    hidden, bias = _hidden(block, q, k, settings), settings.bias
    if hidden is None and bias is None:
        return None
    dtype = torch.promote_types(q.dtype, torch.float32)
    if bias is None:
        added = torch.zeros(hidden.shape, dtype=dtype, device=q.device)
    else:
        added = _of_block(bias, block).to(dtype)
    return _fold(added if hidden is None else added.masked_fill(hidden, -torch.inf), block, q, k)


def _hidden(block: Block, q: Tensor, k: Tensor, settings: Settings) -> Tensor | None:
    """Which keys are hidden from which queries, broadcastable to [samples, Hq, rows, keys]."""
    seqlens, cu, cu_k = settings.seqlens, settings.cu_seqlens, settings.cu_seqlens_k
    queries, keys = q.shape[2], k.shape[2]
    i = torch.arange(block.rows.start, block.rows.stop, device=q.device)[None, None, :, None]
    j = torch.arange(block.keys.start, block.keys.stop, device=q.device)[None, None, None, :]
    hidden = []
    position = i + (keys - queries)
    if cu is not None:
        # the row's sequence n; that of rows behind the last boundary has no keys
        n = (cu <= i).sum(-1, keepdim=True) - 1
        end, start_k, end_k = (_at(t, n) for t in (_ends(cu), cu_k, _ends(cu_k)))
        position = i - end + end_k
        hidden += [j < start_k, j >= end_k]
    if settings.causal:
        hidden.append(j > position)
    if settings.window is not None:
        hidden.append(j <= position - settings.window)
        if not settings.causal:
            hidden.append(j >= position + settings.window)
    if seqlens is not None:
        valid = seqlens.narrow(0, block.samples.start, block.samples.stop - block.samples.start).view(-1, 1, 1, 1)
        hidden.append(j >= valid)
        if queries == keys:
            hidden.append(i >= valid)
    if settings.mask is not None:
        hidden.append(~_of_block(settings.mask, block))
    return reduce(torch.logical_or, hidden) if hidden else None


def _ends(cu: Tensor) -> Tensor:
    return torch.cat((cu.narrow(0, 1, cu.shape[0] - 1), cu.narrow(0, cu.shape[0] - 1, 1)))


def _at(t: Tensor, n: Tensor) -> Tensor:
    return t.gather(0, n.reshape(-1)).reshape(n.shape)


def _factors(block: Block, q: Tensor, k: Tensor, settings: Settings) -> Tensor | None:
    """0 for a dropped weight, 1 / (1 - dropout) for a kept one."""
    if settings.dropout == 0:
        return None
    heads, device = q.shape[1], q.device
    sample = torch.arange(block.samples.start, block.samples.stop, device=device)[:, None, None, None]
    head = torch.arange(heads, device=device)[None, :, None, None]
    i = torch.arange(block.rows.start, block.rows.stop, device=device)[None, None, :, None]
    j = torch.arange(block.keys.start, block.keys.stop, device=device)[None, None, None, :]
    row = _mix(_mix(_mix(settings.seed) ^ (sample * heads + head)) ^ i)
    kept = _mix((row + j * 0x9E3779B9) & 0xFFFFFFFF) >= round(settings.dropout * 2**32)
    factors = kept.to(torch.promote_types(q.dtype, torch.float32)).mul_(1 / (1 - settings.dropout))
    return _fold(factors, block, q, k)


def _mix(h):
    """The last steps of MurmurHash3, of 32 bits inside 64: every bit of h changes half of the bits."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


def _of_block(t: Tensor, block: Block) -> Tensor:
    """A block of ``t [B | 1, Hq | 1, Sq | 1, Sk]``."""
    for dim, part in ((0, block.samples), (2, block.rows), (3, block.keys)):
        if dim == 3 or t.shape[dim] != 1:
            t = t.narrow(dim, part.start, part.stop - part.start)
    return t


def _fold(t: Tensor, block: Block, q: Tensor, k: Tensor) -> Tensor:
    """``t [samples | 1, Hq | 1, rows | 1, keys]`` as the scores lie, broadcastable to [n * Hkv, G * rows, keys]."""
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    samples, heads, rows, keys = t.shape
    if group > 1:
        rows = block.rows.stop - block.rows.start
    if samples == heads == 1:
        return t.expand(1, group, rows, keys).reshape(1, group * rows, keys)
    samples = block.samples.stop - block.samples.start
    return t.expand(samples, kv_heads * group, rows, keys).reshape(samples * kv_heads, group * rows, keys)
