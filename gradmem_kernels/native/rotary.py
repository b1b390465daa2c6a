"""Rotary embedding in C++: the launch of its kernel. Derivation: docs/rotary.md."""

from __future__ import annotations

from torch import Tensor

from gradmem_kernels.native.common import DTYPES, launch, view
from gradmem_kernels.native.common import refusal as refusal_of
from gradmem_kernels.operators.rotary import Rotary, table_strides


def refusal(x: Tensor | None = None) -> str | None:
    """Why this kernel cannot serve such tensors; ``None`` if it can."""
    return refusal_of(x)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, transposed: bool) -> None:
    batch, heads, length, d = x.shape
    launch("rotary", x, {
        "dtype": DTYPES[x.dtype], "table_dtype": DTYPES[cos.dtype], "batch": batch, "heads": heads, "length": length,
        "d": d, "half": cos.shape[-1], "x": view(x), "y": view(y), "cos": (cos.data_ptr(), *table_strides(cos)),
        "sin": (sin.data_ptr(), *table_strides(sin)), "transposed": transposed})


_operators = Rotary("native", _launch)
forward, transpose = _operators.forward, _operators.transpose
