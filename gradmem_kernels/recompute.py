"""Which ``recompute`` of :func:`gradmem_kernels.write` fits in the memory that is free (docs/write.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["RECOMPUTE", "free_memory", "resolve_recompute"]

#: From the fastest to the one that keeps least.
RECOMPUTE = ("none", "step", "layer")
#: Of the free memory, what WRITE may fill: the rest is for what its footprint leaves out.
SHARE = 0.7
#: Where control groups version 2 tell of the limits of a container.
CONTROL_GROUP = Path("/sys/fs/cgroup")


def resolve_recompute(loss_fn: Any, *memory: Tensor, steps: int) -> str:
    """What ``recompute="auto"`` stands for: the fastest of ``"none"``, ``"step"`` and ``"layer"`` that fits.

    Where none does, it is ``"layer"``; a loss without a dual form has no ``"layer"``.

    ``loss_fn.footprint(*memory, steps=K, recompute=...)`` gives the bytes that each takes, as
    :class:`gradmem_kernels.PrefixLoss` does; they are compared with 0.7 of the device's free memory. Without it, and
    where free memory is not known (neither a CPU under Linux nor a CUDA device), it is ``"step"``.

    Args:
        loss_fn: the loss of :func:`gradmem_kernels.write`.
        memory: the memory tensors that WRITE starts from.
        steps: number of steps K.
    """
    free = free_memory(memory[0].device)
    if free is None or not hasattr(loss_fn, "footprint"):
        return "step"
    modes = RECOMPUTE if hasattr(loss_fn, "dual") else RECOMPUTE[:2]
    fits = (mode for mode in modes if loss_fn.footprint(*memory, steps=steps, recompute=mode) <= SHARE * free)
    return next(fits, modes[-1])


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors on this device may still take; ``None`` where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # PyTorch holds on to memory that its tensors have let go
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return min([1024 * int(available.split()[1]), *_below_limit()])


def _below_limit() -> list[int]:
    """What is left of the limit of the container, if there is one."""
    try:
        limit, used = ((CONTROL_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return []
    return [] if limit == "max" else [max(0, int(limit) - int(used))]
