"""What native ops share: whether the compiled modules are here, and how they are told of tensors and launched."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gradmem_kernels.native import build_info
from gradmem_kernels.native.driver import too_old

__all__ = ["CPU_DTYPES", "DTYPES", "address", "cpu", "cuda", "launch", "refusal", "runs_on", "view"]

#: csrc/cpu/tensor.h, csrc/cuda/common.cuh
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
#: Programs that share sums over rows, for each multiprocessor of a CUDA device.
PROGRAMS = 2


def refusal(like: Tensor | None, cuda: bool = True) -> str | None:
    """Why native kernels cannot serve tensors like this one; ``None`` if they can. ``cuda``: whether CUDA has some."""
    device = "cpu" if like is None else like.device.type
    if device == "cuda" and torch.version.hip is None and cuda:
        return _cuda_refusal(like)
    missing = build_info.missing("_cpu")
    if missing is not None or like is None:
        return missing
    if device != "cpu":
        return f"its native kernels run on {'CPUs and CUDA devices' if cuda else 'a CPU'}, not on {device}"
    if like.dtype not in CPU_DTYPES:
        names = ", ".join(str(t).removeprefix("torch.") for t in CPU_DTYPES)
        return f"native kernels take {names} on a CPU, not {like.dtype}"
    return None


def _cuda_refusal(like: Tensor) -> str | None:
    missing = build_info.missing("_cuda")
    if missing is not None:
        return missing
    info = build_info.build_info() or {}
    old = too_old(info.get("cuda_toolkit") or "0")
    if old is not None:
        return old
    architectures = info.get("cuda_architectures") or []
    capability = torch.cuda.get_device_capability(like.device)
    if not runs_on(architectures, capability):
        return (f"compute capability {capability[0]}.{capability[1]}: these kernels were compiled for "
                f"{', '.join(architectures)} (GRADMEM_CUDA_ARCHS)")
    return None


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a device runs what was compiled for these: such code, or what its driver makes of portable code.

    ``90a`` is for 9.0 alone, ``100f`` for its family; without a letter later devices run it too.
    """
    for name in architectures:
        number, letter = name.rstrip("af"), name[-1] if name[-1] in "af" else ""
        version = int(number[:-1]), int(number[-1])
        if capability == version or (letter != "a" and capability > version
                                     and (letter == "" or capability[0] == version[0])):
            return True
    return False


def cpu() -> ModuleType:
    """The compiled module. It shares torch's threads, so that torch must be loaded before it."""
    return importlib.import_module("gradmem_kernels.native._cpu")


def cuda() -> ModuleType:
    """The compiled module for CUDA devices."""
    return importlib.import_module("gradmem_kernels.native._cuda")


def launch(kernel: str, like: Tensor, arguments: Mapping[str, Any], sums: tuple[int, int, int] | None = None) -> None:
    """Runs a kernel on the device of ``like``; on CUDA on its current stream.

    ``sums``: how many sums over rows it makes, over how many rows, of which width. CUDA kernels allocate nothing: what
    their programs add up goes to a workspace.
    """
    if not is_cuda(like):
        getattr(cpu(), kernel)({**arguments, "threads": torch.get_num_threads()})
        return
    workspace, parts = None, 0
    if sums is not None:
        count, rows, width = sums
        parts = min(rows, PROGRAMS * multiprocessors(like))
        workspace = like.new_empty(count, parts, width, dtype=torch.promote_types(like.dtype, torch.float32))
    getattr(cuda(), kernel)({**arguments, "threads": 0, "device": like.device.index or 0, "stream": stream(like),
                             "workspace": address(workspace), "parts": parts})


def is_cuda(t: Tensor) -> bool:
    return t.is_cuda


def multiprocessors(t: Tensor) -> int:
    return torch.cuda.get_device_properties(t.device).multi_processor_count


def stream(t: Tensor) -> int:
    """The current one of the tensor's device."""
    return torch.cuda.current_stream(t.device).cuda_stream


def view(t: Tensor | None, dims: int = 3) -> tuple[int, ...] | None:
    """The address of the first element and the strides of the first ``dims`` dimensions."""
    return None if t is None else (t.data_ptr(), *t.stride()[:dims])


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
