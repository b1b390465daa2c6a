"""What Triton ops share: where they run, and their precision."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["INTERPRETED", "accumulator", "architecture", "dot_precision", "on_device", "refusal"]

#: Whether kernels run in Triton's interpreter; fixed when they are decorated.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def refusal(like: Tensor | None) -> str | None:
    """Why Triton cannot serve tensors like this one; ``None`` if it can."""
    device = like.device.type if like is not None else "cpu" if INTERPRETED else "cuda"
    if device == "cpu":
        if not INTERPRETED:
            return "Triton kernels run on a CPU only in its interpreter, with TRITON_INTERPRET=1 set beforehand"
        if like is not None and like.dtype == torch.bfloat16:
            return "Triton's interpreter is wrong for bfloat16"
        return None
    if device != "cuda" or torch.version.hip is not None:
        return f"Triton kernels run on CUDA devices, not on {device if device != 'cuda' else 'ROCm'}"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set: kernels run on the CPU only"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if like is not None and torch.cuda.get_device_capability(like.device) < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability(like.device)}, at least (8, 0) is needed"
    if like is not None and like.dtype == torch.float64:
        return "float64 is served by the reference backend on a GPU"
    return None


def architecture(like: Tensor) -> str:
    """The key of the tables of configurations: ``"interpreter"``, ``"sm_80"`` or ``"sm_90"``."""
    if INTERPRETED:
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(like.device)[0] == 9 else "sm_80"


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """TF32 for float32 where PyTorch's own matrix products may use it (``torch.set_float32_matmul_precision``).

    Otherwise three TF32 products, which are about as exact as float32 and run on tensor cores: Triton's plain float32
    products spill thousands of bytes in these kernels.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on torch's current device and its current stream: make that the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
