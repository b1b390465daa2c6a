"""What native ops share: whether the compiled module is here, and how it is told of tensors."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from gradmem_kernels.native import build_info

__all__ = ["DTYPES", "address", "cpu", "refusal", "view"]

#: csrc/cpu/tensor.h
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2}


def refusal(like: Tensor | None) -> str | None:
    """Why native kernels cannot serve tensors like this one; ``None`` if they can."""
    missing = build_info.missing("_cpu")
    if missing is not None:
        return missing
    if like is None:
        return None
    if like.device.type != "cpu":
        return f"native kernels run on a CPU, not on {like.device.type}"
    if like.dtype not in DTYPES:
        return f"native kernels take {', '.join(str(t).removeprefix('torch.') for t in DTYPES)}, not {like.dtype}"
    return None


def cpu() -> ModuleType:
    """The compiled module. It shares torch's threads, so that torch must be loaded before it."""
    return importlib.import_module("gradmem_kernels.native._cpu")


def view(t: Tensor | None, dims: int = 3) -> tuple[int, ...] | None:
    """The address of the first element and the strides of the first ``dims`` dimensions."""
    return None if t is None else (t.data_ptr(), *t.stride()[:dims])


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
