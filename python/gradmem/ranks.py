"""Which of the processes of one launch this is, and tensors that belong to several of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "connected", "like", "mean_over_ranks", "whole"]


class Ranks(NamedTuple):
    """The process ``rank`` of ``world``, and the ``local`` one of its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Ranks:
        """From the environment; a process that was started alone is the only one."""
        return cls(*(int(os.environ.get(name, default))
                     for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))))

    @classmethod
    def connected(cls) -> Ranks:
        """From the process group, where there is one: of processes that compute one thing together."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), cls.here().local)

    def device(self, name: str) -> str:
        """The device ``name``; where that is an accelerator without a number, each of several processes has its own."""
        return name if self.world == 1 or ":" in name or name == "cpu" else f"{name}:{self.local}"


@contextlib.contextmanager
def connected(device: torch.device) -> Iterator[torch.device]:
    """Within it the processes that ``torchrun`` started know each other; nothing, where there is one.

    Yields ``device``, the one that each of them computes on.
    """
    if Ranks.here().world == 1:
        yield device
        return
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group(dist.get_default_backend_for_device(device))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def whole(t: Tensor) -> Tensor:
    """``t``, or what its parts on all processes make together."""
    return cast(Any, t).full_tensor() if hasattr(t, "full_tensor") else t


def like(value: Tensor, weight: Tensor) -> Tensor:
    """A copy of ``value``, which all processes have: on the device of ``weight``, in parts where that is."""
    value = value.to(weight.device, copy=True)
    if not hasattr(weight, "full_tensor") or value.shape != weight.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mine = cast(Any, weight)
    return distribute_tensor(value, mine.device_mesh, mine.placements, src_data_rank=None)


def mean_over_ranks(total: Tensor, count: Tensor | int, group: dist.ProcessGroup | None) -> Tensor:
    """``total / count`` (0 for none), both summed over the processes of ``group``.

    Its gradient on each process is the number of processes times that of its own part: what DDP and FSDP2 make of
    these, their mean, is the gradient of the value.
    """
    if group is None:
        return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
    sums = torch.stack([torch.as_tensor(count, device=total.device).to(total.dtype), total.detach()])
    dist.all_reduce(sums, group=group)
    number, value = sums[0].clamp(min=1), sums[1]
    share = total * (group.size() / number)
    return share + (value / number - share).detach()
