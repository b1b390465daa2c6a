"""What rms_norm and layer_norm share on Triton: the launches of their kernels.

Derivations: docs/rms_norm.md, docs/layer_norm.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gradmem_kernels.operators.norm import Backward, Forward, Norm
from gradmem_kernels.operators.rows import as_rows
from gradmem_kernels.triton import norm_kernels as kernels
from gradmem_kernels.triton.common import accumulator, on_device

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


def _launch_forward(tensors: Forward, y: Tensor, y_t: Tensor | None, s: Tensor | None, s_t: Tensor | None,
                    rstd: Tensor, mean: Tensor | None) -> None:
    inner, (x, x_t, residual, residual_t), strides = as_rows(tensors.x, tensors.x_t, tensors.residual,
                                                             tensors.residual_t)
    weight, weight_t, bias, bias_t = map(_dense, (tensors.weight, tensors.weight_t, tensors.bias, tensors.bias_t))
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    of = tile("dual_forward_add" if s is not None and y_t is not None else "forward", width)
    with on_device(x):
        kernels.forward_kernel[triton.cdiv(rows, of.rows),](
            x, x_t, residual, residual_t, weight, weight_t, bias, bias_t, y, y_t, s, s_t, rstd, mean, *strides,
            rows, inner, tensors.eps, D=width, ROWS=of.rows, BLOCK=of.block, ACC=accumulator(x.dtype),
            num_warps=of.warps)


def _launch_backward(tensors: Backward, dx: Tensor | None, dx_t: Tensor | None, y_t: Tensor | None,
                     *totals: Tensor | None) -> None:
    inner, (x, x_t, a, b, g, h), strides = as_rows(tensors.x, tensors.x_t, *tensors[7:])
    rows, width, sums = x.shape[:-1].numel(), x.shape[-1], sum(t is not None for t in totals)
    dual = any(t is not None for t in (x_t, tensors.weight_t, a))
    summed = g is not None or h is not None
    of = tile(("dual_" if dual else "") + "backward" + ("_add" if summed else "") + ("_sums" if sums else ""), width)
    blocks = triton.cdiv(rows, of.rows)
    programs = min(blocks, _most_programs(x)) if sums else blocks
    partial = iter(tensors.rstd.new_empty(sums, programs, width).unbind(0))
    dw, dc, dw_t, dc_t = of_programs = [None if t is None else next(partial) for t in totals]
    with on_device(x):
        kernels.backward_kernel[programs,](
            x, x_t, a, b, g, h, *map(_dense, (tensors.weight, *tensors[3:7])), dx, dx_t, y_t, dw, dw_t, dc, dc_t,
            *strides, rows, inner, programs, D=width, ROWS=of.rows, BLOCK=of.block, ACC=accumulator(x.dtype),
            num_warps=of.warps)
    for total, of_each in zip(totals, of_programs, strict=True):
        if total is not None:
            # PyTorch's sum is deterministic; [programs, D] is small beside what the kernel reads
            total.copy_(of_each.sum(0))


def _most_programs(x: Tensor) -> int:
    return PROGRAMS * (torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


operators = Norm("triton", _launch_forward, _launch_backward)
