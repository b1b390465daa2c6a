"""What rms_norm and layer_norm share in C++: the launches of their kernels.

Derivations: docs/rms_norm.md, docs/layer_norm.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradmem_kernels.native.common import DTYPES, address, launch
from gradmem_kernels.operators.norm import Backward, Forward, Norm
from gradmem_kernels.operators.rows import as_rows


def _launch_forward(tensors: Forward, *results: Tensor | None) -> None:
    rows, _alive = _rows(("x", "x_t", "r", "r_t"), (tensors.x, tensors.x_t, tensors.residual, tensors.residual_t))
    weights, _alive_too = _dense(("w", "c", "w_t", "c_t"), (tensors.weight, tensors.bias, tensors.weight_t,
                                                            tensors.bias_t))
    names = ("y", "y_t", "s", "s_t", "rstd", "mean")
    launch("norm_forward", tensors.x, {**rows, **weights, "eps": tensors.eps,
                                       **dict(zip(names, map(address, results), strict=True))})


def _launch_backward(tensors: Backward, *results: Tensor | None) -> None:
    rows, _alive = _rows(("x", "x_t", "a", "b", "g", "h"), (tensors.x, tensors.x_t, *tensors[7:]))
    weights, _alive_too = _dense(("w", "w_t", "c_t", "rstd", "mean"), (tensors.weight, *tensors[3:7]))
    names = ("dx", "dx_t", "y_t", "dw", "dc", "dw_t", "dc_t")
    sums = sum(t is not None for t in results[3:])
    launch("norm_backward", tensors.x, {**rows, **weights, **dict(zip(names, map(address, results), strict=True))},
           sums=(sums, rows["rows"], rows["width"]) if sums else None)


def _rows(names: Sequence[str], tensors: Sequence[Tensor | None]) -> tuple[dict[str, Any], list[Tensor | None]]:
    """What both kernels are told of inputs, x first; and the tensors that they will read."""
    inner, tensors, strides = as_rows(*tensors)
    x = tensors[0]
    views = (None if t is None else (t.data_ptr(), *of) for t, of in zip(tensors, strides, strict=True))
    return {"dtype": DTYPES[x.dtype], "rows": x.shape[:-1].numel(), "width": x.shape[-1], "inner": inner,
            **dict(zip(names, views, strict=True))}, tensors


def _dense(names: Sequence[str], tensors: Sequence[Tensor | None]) -> tuple[dict[str, int], list[Tensor | None]]:
    dense = [None if t is None else t.contiguous() for t in tensors]
    return dict(zip(names, map(address, dense), strict=True)), dense


operators = Norm("native", _launch_forward, _launch_backward)
