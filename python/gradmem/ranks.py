"""Which of the processes of one launch this is, as ``torchrun`` tells."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

__all__ = ["Ranks"]


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

    def device(self, device: torch.device) -> torch.device:
        """``device``, or where that is an accelerator without a number and there are several processes, its own one."""
        if self.world == 1 or device.type == "cpu":
            return device
        return torch.device(device.type, self.local)
