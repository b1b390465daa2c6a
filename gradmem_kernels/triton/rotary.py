"""Rotary embedding on Triton: one pass that turns channel pairs (i, i + r/2). Derivation: docs/rotary.md.

The transpose is the same kernel with the sine negated.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradmem_kernels.operators.define import strides
from gradmem_kernels.operators.rotary import Rotary, table_strides
from gradmem_kernels.triton.common import accumulator, on_device
from gradmem_kernels.triton.common import refusal as refusal_of

#: Pairs of channels of a tile, and the heads that a program turns by one reading of the tables.
PAIRS, HEADS, WARPS = 1024, 4, 4


def refusal(x=None):
    """Why this kernel cannot serve such tensors; ``None`` if it can."""
    return refusal_of(x)


@triton.jit
def _load(p_x, s_row, row, length, o_d, SIZE: tl.constexpr):
    """Channels ``o_d < SIZE`` of the rows, a tile; zero outside."""
    inside = (row < length)[:, None] & (o_d < SIZE)[None, :]
    return tl.load((p_x + row * s_row)[:, None] + o_d[None, :], mask=inside, other=0.0)


@triton.jit
def _store(p_x, s_row, row, length, o_d, b_x, SIZE: tl.constexpr):
    inside = (row < length)[:, None] & (o_d < SIZE)[None, :]
    tl.store((p_x + row * s_row)[:, None] + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=inside)


@triton.jit
def rotary_kernel(
        p_x, p_y,  # [B, H, S, d]
        p_cos, p_sin,  # [B, S, r/2]
        s_x, s_y,  # of sample, head and position
        s_cos, s_sin,  # of sample and position; tables that samples share have a stride of 0
        heads, length,
        HALF: tl.constexpr, HALF_P: tl.constexpr, REST: tl.constexpr, REST_P: tl.constexpr, TRANSPOSED: tl.constexpr,
        ROWS: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr):
    """A block of positions of up to ``HEADS`` heads; ``HALF`` pairs, and ``REST`` channels that pass through."""
    blocks, groups = tl.cdiv(length, ROWS), tl.cdiv(heads, HEADS)
    row = tl.cast(tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS), tl.int64)
    first = tl.program_id(0) // blocks % groups * HEADS
    batch = tl.cast(tl.program_id(0) // blocks // groups, tl.int64)
    o_pair = tl.arange(0, HALF_P)
    cos = _load(p_cos + batch * s_cos[0], s_cos[1], row, length, o_pair, HALF).to(ACC)
    sin = _load(p_sin + batch * s_sin[0], s_sin[1], row, length, o_pair, HALF).to(ACC)
    if TRANSPOSED:
        sin = -sin
    for head in range(first, min(first + HEADS, heads)):
        p_from = p_x + batch * s_x[0] + tl.cast(head, tl.int64) * s_x[1]
        p_to = p_y + batch * s_y[0] + tl.cast(head, tl.int64) * s_y[1]
        x1 = _load(p_from, s_x[2], row, length, o_pair, HALF).to(ACC)
        x2 = _load(p_from + HALF, s_x[2], row, length, o_pair, HALF).to(ACC)
        # y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin
        _store(p_to, s_y[2], row, length, o_pair, x1 * cos - x2 * sin, HALF)
        _store(p_to + HALF, s_y[2], row, length, o_pair, x2 * cos + x1 * sin, HALF)
        if REST > 0:
            o_rest = tl.arange(0, REST_P)
            rest = _load(p_from + 2 * HALF, s_x[2], row, length, o_rest, REST)
            _store(p_to + 2 * HALF, s_y[2], row, length, o_rest, rest, REST)


def _launch(x, cos, sin, y, transposed):
    batch, heads, length, d = x.shape
    half = cos.shape[-1]
    pairs, rest = (triton.next_power_of_2(max(1, size)) for size in (half, d - 2 * half))
    rows = max(1, PAIRS // max(pairs, rest // 2))
    grid = batch * triton.cdiv(heads, HEADS) * triton.cdiv(length, rows)
    with on_device(x):
        rotary_kernel[grid,](
            x, y, cos, sin, strides(x), strides(y), table_strides(cos), table_strides(sin), heads, length,
            HALF=half, HALF_P=pairs, REST=d - 2 * half, REST_P=rest, TRANSPOSED=transposed, ROWS=rows, HEADS=HEADS,
            ACC=accumulator(x.dtype), num_warps=WARPS)


operators = Rotary("triton", _launch)
forward, transpose = operators.forward, operators.transpose
