"""The inner update in C++: the launches of its kernels. Derivation and names: docs/inner_sgd.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradmem_kernels.native.common import DTYPES, address, launch, view
from gradmem_kernels.native.common import refusal as refusal_of
from gradmem_kernels.operators.inner_sgd import Backward, Forward, InnerSGD, Settings


def refusal(memory: Tensor | None = None, *_: Tensor | None) -> str | None:
    """Why these kernels cannot serve such tensors; ``None`` if they can."""
    return refusal_of(memory)


def _launch_forward(tensors: Forward, settings: Settings, y: Tensor | None, y_t: Tensor | None) -> None:
    like = y if y_t is None else y_t
    launch("inner_sgd_forward", like, _arguments(like, settings, {**tensors._asdict(), "y": y, "y_t": y_t}))


def _launch_backward(tensors: Backward, settings: Settings, *results: Tensor | None) -> None:
    results_by_name = dict(zip(("dg", "dr", "dg_t", "dr_t"), results, strict=True))
    like = tensors.b if tensors.a is None else tensors.a
    launch("inner_sgd_backward", like, _arguments(like, settings, {**tensors._asdict(), **results_by_name}))


def _arguments(like: Tensor, settings: Settings, tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    rates = {name: tensors[name] for name in ("rate", "rate_t")}
    lr, clip_value, clip_norm = settings
    return {"dtype": DTYPES[like.dtype], "batch": like.shape[0], "width": like.shape[1], "lr": lr,
            "clamp": clip_value is not None, "clip_value": clip_value or math.inf, "clip_norm": clip_norm or math.inf,
            **{name: address(t) for name, t in tensors.items()},
            # one number of a sample is read again for each of its elements
            **{name: None if t is None else (*view(t, 1), 0 if t.shape[1] == 1 else 1) for name, t in rates.items()}}


_operators = InnerSGD("native", _launch_forward, _launch_backward)
forward, backward = _operators.forward, _operators.backward
dual_forward, dual_backward = _operators.dual_forward, _operators.dual_backward
