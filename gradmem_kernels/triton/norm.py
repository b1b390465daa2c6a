"""What rms_norm and layer_norm share on Triton. Derivations: docs/rms_norm.md, docs/layer_norm.md.

Two operators serve all orders. A plain backward is the cotangent of the tangents, ``x_t_bar = backward(x; y_t_bar)``,
with the output's cotangent in the place of ``b``. ``x`` holds x, weight and bias, ``saved`` rstd and mean (None in
rms_norm). A ``residual`` is added to x first, and the sum is the second output. The backward kernels find the sum in
the place of x, and its cotangent behind that of y: ``g``, that of its tangent ``h``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gradmem_kernels.operators.define import define
from gradmem_kernels.operators.rows import as_rows, mapped_over_rows, parts, stacked
from gradmem_kernels.triton import norm_kernels as kernels
from gradmem_kernels.triton.common import accumulator, on_device

NONE, NEITHER = (None,) * 3, (False,) * 3

#: The widest row that is one tile, of a sum (``add``) or not, with its sums over rows or without: what fits in
#: registers. Wider rows are gone over in tiles of COLUMNS.
ONE_TILE = {"forward": 16384, "dual_forward_add": 8192,
            "backward": 16384, "backward_sums": 8192, "backward_add": 8192, "backward_add_sums": 8192,
            "dual_backward": 8192, "dual_backward_sums": 4096, "dual_backward_add": 8192,
            "dual_backward_add_sums": 4096}
COLUMNS = 4096
#: Kernels whose threads have 16 elements each, in tiles of at most so many rows. With 8 the assembler goes for more
#: warps than there are registers for, and spills.
SIXTEEN = {"dual_forward_add": 2048, "dual_backward_add": 1, "backward_add_sums": 2048}
#: Elements of a tile of several rows, where rows are narrower.
ELEMENTS = 2048
#: Programs that share the sums over rows, for each multiprocessor; in the interpreter, in all.
PROGRAMS = 2


class Tile(NamedTuple):
    rows: int
    block: int
    warps: int


def tile(kernel: str, width: int) -> Tile:
    """The tile of a kernel of :data:`ONE_TILE` for rows of this width: 8 elements for each thread, 16 in the widest."""
    block = triton.next_power_of_2(max(1, width))
    if block > ONE_TILE[kernel]:
        block = min(block, COLUMNS)
    rows = max(1, ELEMENTS // block)
    elements = 16 if rows <= SIXTEEN.get(kernel, 0) else 8
    return Tile(rows, block, min(32, max(4, rows * block // (32 * elements))))


def forward(x, residual, *, eps, centred):
    y, stats, s = _forward(*x, *NONE, residual, None, eps, centred)
    return (y,) if residual is None else (y, s), stats.unbind(0)


def backward(x, saved, y_bar, needs):
    return dual_backward(x, NONE, saved, (None,), y_bar, NEITHER, needs)[1]


def dual_forward(x, x_t, residual, residual_t, *, eps, centred):
    out, stats, sums = _forward(*x, *x_t, residual, residual_t, eps, centred)
    y, y_t = zip(out.unbind(0), *(() if residual is None else (sums.unbind(0),)), strict=True)
    return y, y_t, stats.unbind(0)


def dual_backward(x, x_t, saved, y_bar, y_t_bar, needs, needs_t):
    (a, g), (b, h) = ((*bar, None)[:2] for bar in (y_bar, y_t_bar))
    if b is None:
        return (_of_sum(x, g, needs) if a is None else backward(x, saved, y_bar, needs)), _of_sum(x, h, needs_t)
    out, _, *sums = _backward(*x[:2], *x_t, *_rstd_mean(saved), a, b, g, h, (needs[0], needs_t[0]), False,
                              (*needs[1:], *needs_t[1:]))
    dx, dx_t = parts(out, (needs[0], needs_t[0]))
    dw, dc, dw_t, dc_t = (t if need else None for t, need in zip(sums, (*needs[1:], *needs_t[1:]), strict=True))
    return (dx, dw, dc), (dx_t, dw_t, dc_t)


def double_backward(x, x_t, saved, y_bar, needs):
    dx, y_t, dw, dc, *_ = _backward(*x[:2], *x_t, *_rstd_mean(saved), None, y_bar[0], None, None, (needs[0], False),
                                    True, (*needs[1:], False, False))
    return tuple(t if need else None for t, need in zip((dx, dw, dc), needs, strict=True)), (y_t,)


def _of_sum(x, s_bar, needs):
    """The cotangents of x where y has none: that of the sum, in a tensor of its own, and zeros."""
    return tuple(None if not need else s_bar.clone() if i == 0 and s_bar is not None else torch.zeros_like(t)
                 for i, (t, need) in enumerate(zip(x, needs, strict=True)))


def _rstd_mean(saved):
    return (*saved, None)[:2]


def _forward_meta(x, weight, bias, x_t, weight_t, bias_t, residual, residual_t, eps, centred):
    """``y``, or ``y`` and ``y_t`` in one, ``[1 | 2, ..., 1]``: rstd and in layer_norm mean; and the sum like ``y``.

    Nothing is written; without a residual the sum is empty.
    """
    dual = any(t is not None for t in (x_t, weight_t, bias_t, residual_t))
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (stacked(x, 1 + dual), x.new_empty(1 + centred, *x.shape[:-1], 1, dtype=dtype),
            stacked(x, 0 if residual is None else 1 + dual))


def _forward_launch(x, weight, bias, x_t, weight_t, bias_t, residual, residual_t, eps, centred):
    out = _forward_meta(x, weight, bias, x_t, weight_t, bias_t, residual, residual_t, eps, centred)
    dual, summed = out[0].dim() > x.dim(), residual is not None
    y, y_t = parts(out[0], (True, dual))
    rstd, mean = (*out[1].unbind(0), None)[:2]
    s, s_t = parts(out[2], (summed, summed and dual))
    if x_t is None:
        x_t, residual_t = residual_t, None
    if s_t is not None and x_t is None:
        s_t.zero_()
        s_t = None
    inner, (x, x_t, residual, residual_t), strides = as_rows(x, x_t, residual, residual_t)
    weight, weight_t, bias, bias_t = map(_dense, (weight, weight_t, bias, bias_t))
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    of = tile("dual_forward_add" if summed and dual else "forward", width)
    if x.numel() > 0:
        with on_device(x):
            kernels.forward_kernel[triton.cdiv(rows, of.rows),](
                x, x_t, residual, residual_t, weight, weight_t, bias, bias_t, y, y_t, s, s_t, rstd, mean, *strides,
                rows, inner, eps, D=width, ROWS=of.rows, BLOCK=of.block, ACC=accumulator(x.dtype), num_warps=of.warps)
    return out


def _backward_meta(x, weight, x_t, weight_t, bias_t, rstd, mean, a, b, g, h, needs, tangent, sums):
    """``dx`` and ``dx_t`` in one, ``y_t``, and ``dw, dc, dw_t, dc_t``, not written; what is not wanted is empty."""
    return (stacked(x, sum(needs)), stacked(x, int(tangent)),
            *(weight.new_empty(weight.shape if wanted else 0) for wanted in sums))


def _backward_launch(x, weight, x_t, weight_t, bias_t, rstd, mean, a, b, g, h, needs, tangent, sums):
    dx, y_t, *_ = out = _backward_meta(x, weight, x_t, weight_t, bias_t, rstd, mean, a, b, g, h, needs, tangent, sums)
    dx, dx_t = parts(dx, needs)
    y_t = y_t if tangent else None
    if dx is None and y_t is None and not any(sums[:2]):
        x_t = weight_t = a = None
    g, h = (t if wanted is not None else None for t, wanted in ((g, dx), (h, dx_t)))
    inner, (x, x_t, a, b, g, h), strides = as_rows(x, x_t, a, b, g, h)
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    dual = any(t is not None for t in (x_t, weight_t, a))
    summed = g is not None or h is not None
    of = tile(("dual_" if dual else "") + "backward" + ("_add" if summed else "") + ("_sums" if any(sums) else ""),
              width)
    blocks = triton.cdiv(rows, of.rows)
    programs = min(blocks, _most_programs(x)) if any(sums) else blocks
    # the bias is not in n: its cotangent is that of y
    seen = [wanted and (i != 1 or a is not None) for i, wanted in enumerate(sums)]
    partial = iter(rstd.new_empty(sum(seen), programs, width).unbind(0))
    dw, dc, dw_t, dc_t = partial = [next(partial) if flag else None for flag in seen]
    if x.numel() > 0:
        with on_device(x):
            kernels.backward_kernel[programs,](
                x, x_t, a, b, g, h, *map(_dense, (weight, weight_t, bias_t, rstd, mean)), dx, dx_t, y_t, dw,
                dw_t, dc, dc_t, *strides, rows, inner, programs, D=width, ROWS=of.rows, BLOCK=of.block,
                ACC=accumulator(x.dtype), num_warps=of.warps)
    for total, of_programs, wanted in zip(out[2:], partial, sums, strict=True):
        if of_programs is not None:
            # PyTorch's sum is deterministic; [programs, D] is small beside what the kernel reads
            total.copy_(of_programs.sum(0))
        elif wanted:
            total.zero_()
    return out


def _most_programs(x: Tensor) -> int:
    return PROGRAMS * (torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


_forward = define(
    "norm_forward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? x_t, Tensor? weight_t, Tensor? bias_t, Tensor? residual, "
    "Tensor? residual_t, float eps, bool centred) -> (Tensor, Tensor, Tensor)", _forward_launch, _forward_meta,
    mapped=lambda *args: mapped_over_rows(*args, weights=("weight", "bias", "weight_t", "bias_t")))
_backward = define(
    "norm_backward",
    "(Tensor x, Tensor weight, Tensor? x_t, Tensor? weight_t, Tensor? bias_t, Tensor rstd, Tensor? mean, Tensor? a, "
    "Tensor b, Tensor? g, Tensor? h, bool[] needs, bool tangent, bool[] sums) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_launch, _backward_meta,
    mapped=lambda *args: mapped_over_rows(*args, weights=("weight", "weight_t", "bias_t"), sums="sums"))
