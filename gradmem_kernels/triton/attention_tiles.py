"""What the attention kernels do with tiles: loads, products over the head dimension, what is visible, scores, dropout.

Names are those of gradmem_kernels/triton/attention_kernels.py; formulas: docs/attention.md.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: Rows of a block of row statistics, a multiple of every tile's.
STATS = tl.constexpr(128)


@triton.jit
def load_columns(rows, column, SIZE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Columns ``column`` and on of a block of rows of x ``[rows, D]`` as a tile ``[SIZE, WIDTH]``.

    ``rows`` is (pointer to x, its row stride, first row of the block, low, high); rows outside of ``low <= row < high``
    read as zero.
    """
    p_x, stride, start, low, high = rows
    o_r = tl.arange(0, SIZE)
    o_d = column + tl.arange(0, WIDTH)
    visible = ((start + o_r >= low) & (start + o_r < high))[:, None]
    if D % WIDTH != 0:
        visible = visible & (o_d < D)[None, :]
    # the start in 64 bits, the rest of the offset in 32
    p_tile = p_x + tl.cast(start, tl.int64) * stride + (o_r[:, None] * stride + o_d[None, :])
    return tl.load(p_tile, mask=visible, other=0.0)


@triton.jit
def load_rows(rows, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    return load_columns(rows, 0, SIZE, D, DP)


@triton.jit
def store_rows(rows, b_x, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    p_x, stride, start, low, high = rows
    o_r = tl.arange(0, SIZE)
    o_d = tl.arange(0, DP)
    inside = ((start + o_r >= low) & (start + o_r < high))[:, None]
    if D != DP:
        inside = inside & (o_d < D)[None, :]
    p_tile = p_x + tl.cast(start, tl.int64) * stride + (o_r[:, None] * stride + o_d[None, :])
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=inside)


@triton.jit
def statistics_pointers(p_stats, head, Sq, start, which: tl.constexpr, SIZE: tl.constexpr):
    """Pointers to the ``which``-th statistic of the rows from ``start``, a multiple of ``SIZE``, on."""
    start = tl.cast(start, tl.int32)
    p_block = p_stats + (tl.cast(head, tl.int64) * tl.cdiv(Sq, STATS) + start // STATS) * (4 * STATS)
    return p_block + (which * STATS + start % STATS + tl.arange(0, SIZE))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def dot_if(condition, a, b, acc, SOMETIMES: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + a b``; with ``SOMETIMES``, ``a b`` is known to be zero unless ``condition``."""
    if SOMETIMES:
        if condition:
            acc = dot(a, b, acc, PRECISION)
    else:
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def product(a, b, b_a, b_b, acc, D: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + a b^T`` over the head dimension, of blocks of rows ``a``, ``b`` and their tiles.

    Where tiles do not fit in registers, ``PART`` columns at a time are read again from memory.
    """
    if b_a.shape[1] <= PART:
        acc = dot(b_a, tl.trans(b_b), acc, PRECISION)
    else:
        for column in tl.range(0, D, PART, disable_licm=True):
            a_part = load_columns(a, column, b_a.shape[0], D, PART)
            b_part = load_columns(b, column, b_b.shape[0], D, PART)
            acc = dot(a_part, tl.trans(b_part), acc, PRECISION)
    return acc


@triton.jit
def product_if(condition, a, b, b_a, b_b, acc, SOMETIMES: tl.constexpr, D: tl.constexpr, PART: tl.constexpr,
                PRECISION: tl.constexpr):
    """:func:`product`, known to be ``acc`` unless ``condition``."""
    if SOMETIMES:
        if condition:
            acc = product(a, b, b_a, b_b, acc, D, PART, PRECISION)
    else:
        acc = product(a, b, b_a, b_b, acc, D, PART, PRECISION)
    return acc


@triton.jit
def touches(start, size, low, high):
    """Whether a block has rows in ``low <= row < high``."""
    return (start < high) & (start + size > low)


@triton.jit
def valid(p_seqlens, batch, Sq, Sk):
    """The numbers of valid queries and keys of a sample."""
    if p_seqlens is None:
        valid_q = Sq
        valid_k = Sk
    else:
        valid_k = tl.load(p_seqlens + batch).to(tl.int32)
        valid_q = tl.where(Sq == Sk, valid_k, Sq)
    return valid_q, valid_k


@triton.jit
def bounds(own, own_size, other_size, own_valid, other_valid, shift, window, p_rows, QUERIES: tl.constexpr,
            CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The interval ``lo <= other < hi`` that each row ``own`` sees; ``lo = other_size, hi = 0`` where that is empty.

    ``own + shift`` is the row's position on the other side; packed sequences have their own interval and shift for
    each row, in ``p_rows [3, own_size]``.
    """
    if p_rows is None:
        lo = tl.zeros_like(own)
        hi = lo + other_valid
        position = own + shift
    else:
        lo = tl.load(p_rows + own, mask=own < own_size, other=0)
        hi = tl.load(p_rows + own_size + own, mask=own < own_size, other=0)
        position = own + tl.load(p_rows + 2 * own_size + own, mask=own < own_size, other=0)
    if CAUSAL and QUERIES:
        hi = tl.minimum(hi, position + 1)
    elif WINDOW:
        hi = tl.minimum(hi, position + window)
    if CAUSAL and not QUERIES:
        lo = tl.maximum(lo, position)
    elif WINDOW:
        lo = tl.maximum(lo, position - window + 1)
    none = (own >= own_valid) | (lo >= hi)
    return tl.where(none, other_size, lo), tl.where(none, 0, hi)


@triton.jit
def tanh(x):
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def scores(raw, own_start, other_start, lo, hi, own_size, other_size, scale, cap, p_bias, s_bias, p_mask, s_mask,
            OWN: tl.constexpr, OTHER: tl.constexpr, CAP: tl.constexpr):
    """S of a tile ``[OWN, OTHER]`` in units of log 2, less infinity where hidden; and ``u = S / cap``.

    ``s_bias`` and ``s_mask`` hold the strides of own and other rows.
    """
    u = raw
    if CAP:
        # S = cap * tanh(raw / cap)
        u = tanh(raw * (scale / cap))
        s = u * (cap * LOG2E)
    else:
        s = raw * (scale * LOG2E)
    other = other_start + tl.arange(0, OTHER)
    if p_bias is not None or p_mask is not None:
        o_own = tl.arange(0, OWN)[:, None]
        o_other = tl.arange(0, OTHER)[None, :]
        inside = (own_start + o_own < own_size) & (other_start + o_other < other_size)
        own_start = tl.cast(own_start, tl.int64)
        other_start = tl.cast(other_start, tl.int64)
        if p_bias is not None:
            p_tile = p_bias + (own_start * s_bias[0] + other_start * s_bias[1])
            bias = tl.load(p_tile + (o_own * s_bias[0] + o_other * s_bias[1]), mask=inside, other=0.0)
            s += bias.to(s.dtype) * LOG2E
        if p_mask is not None:
            p_tile = p_mask + (own_start * s_mask[0] + other_start * s_mask[1])
            shown = tl.load(p_tile + (o_own * s_mask[0] + o_other * s_mask[1]), mask=inside, other=0)
            s = tl.where(shown != 0, s, -float("inf"))
    # only tiles on the border of what is visible need the comparison
    if (other_start < tl.max(lo, 0)) | (other_start + OTHER > tl.min(hi, 0)):
        s = tl.where((other[None, :] >= lo[:, None]) & (other[None, :] < hi[:, None]), s, -float("inf"))
    return s, u


@triton.jit
def mix(h):
    """The finaliser of MurmurHash3."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def random_states(seed, head, i):
    """The random state of each query ``i`` of a head, the ``head``-th of the batch."""
    h = mix(tl.cast(seed, tl.uint32, bitcast=True))
    return mix(mix(h ^ tl.cast(head, tl.uint32)) ^ i.to(tl.uint32))


@triton.jit
def dropped(x, row_keys, j, threshold, inverse):
    """``Z * x``: ``x / (1 - dropout)`` where kept, 0 where dropped. ``row_keys`` and keys ``j`` broadcast to ``x``."""
    bits = mix(row_keys + j.to(tl.uint32) * 0x9E3779B9)
    kept = (bits ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold
    return tl.where(kept, x * inverse, 0.0)


@triton.jit
def tangent(p, u, raw_t, mu, scale, CAP: tl.constexpr):
    """``S_t`` and ``P_t = P * (S_t - mu)``."""
    s_t = raw_t * scale
    if CAP:
        s_t = s_t * (1 - u * u)
    return s_t, p * (s_t - mu)


@triton.jit
def through_cap(ds, ds_t, u, s_t, cap, HAS_ST: tl.constexpr):
    """Cotangents of S and S_t to those of what the soft cap took: ``dS * S'`` and its tangent."""
    slope = 1 - u * u
    ds_t = ds_t * slope
    if HAS_ST:
        ds_t -= 2 / cap * u * s_t * ds
    return ds * slope, ds_t
