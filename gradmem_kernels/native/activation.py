"""What swiglu and gelu share in C++: the launches of their kernels. Derivations: docs/swiglu.md, docs/gelu.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradmem_kernels.native.common import DTYPES, address, launch
from gradmem_kernels.operators.activation import Activation, Backward, Forward
from gradmem_kernels.operators.rows import flat_or_rows

#: csrc/common/activation.h
FORMS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def _launch_forward(tensors: Forward, results: Sequence[Tensor | None], form: str) -> None:
    arguments, _alive = _arguments(("x", "up", "x_t", "up_t"), tensors, ("y", "y_t"), results, form)
    launch("activation_forward", tensors.x, arguments)


def _launch_backward(tensors: Backward, results: Sequence[Tensor | None], form: str) -> None:
    arguments, _alive = _arguments(("x", "up", "x_t", "up_t", "a", "b"), tensors, ("dx", "dx_t", "dup", "dup_t", "y_t"),
                                   results, form)
    launch("activation_backward", tensors.x, arguments)


def _arguments(names: Sequence[str], tensors: Sequence[Tensor | None], result_names: Sequence[str],
               results: Sequence[Tensor | None], form: str) -> tuple[dict[str, Any], list[Tensor | None]]:
    """What a kernel is told; and the tensors that it will read."""
    rows, width, tensors, strides = flat_or_rows(*tensors)
    views = (None if t is None else (t.data_ptr(), of) for t, of in zip(tensors, strides, strict=True))
    return {"dtype": DTYPES[tensors[0].dtype], "form": FORMS[form], "rows": rows, "width": width,
            **dict(zip(names, views, strict=True)),
            **dict(zip(result_names, map(address, results), strict=True))}, tensors


operators = Activation("native", _launch_forward, _launch_backward)
