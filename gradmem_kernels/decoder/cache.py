"""Keys and values of the positions that a decoder has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmem_kernels.checks import Checker

__all__ = ["KVCache", "LayerCache"]

@dataclass
class KVCache:
    """Keys and values of the positions seen so far, ``[B, Hkv, capacity, d]`` a layer, right-padded.

    ``lengths [B]`` counts the positions of each row. ``longest`` bounds it without a look at the device.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    longest: int
    ragged: bool = False

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def repeat(self, n: int, capacity: int) -> KVCache:
        """A new cache with every row repeated ``n`` times (row ``b`` becomes ``b * n .. b * n + n - 1``)."""
        if capacity < self.longest:
            Checker("KVCache.repeat").fail("capacity", f"at least the positions held, {self.longest}", capacity)

        def grow(t: Tensor) -> Tensor:
            rows = t[:, :, : self.longest].repeat_interleave(n, 0)
            return F.pad(rows, (0, 0, 0, capacity - self.longest))

        return KVCache([grow(k) for k in self.keys], [grow(v) for v in self.values],
                       self.lengths.repeat_interleave(n), self.longest, self.ragged)

    def truncate(self, lengths: Tensor) -> None:
        """Keeps the first ``lengths[b]`` positions of row ``b``; the others are written over by what comes next."""
        check = Checker("KVCache.truncate")
        check.sizes["B"] = self.lengths.shape[0]
        check.tensor("lengths", lengths, ("B",), dtypes=(torch.int32, torch.int64))
        self.lengths, self.ragged = lengths.to(torch.int64), True

    def advance(self, positions: int) -> None:
        self.lengths, self.longest = self.lengths + positions, self.longest + positions

    def common_length(self, op: str) -> int:
        if self.ragged:
            Checker(op).fail("cache", "rows of one length", "rows of different lengths",
                             "append to ragged rows one position at a time, with Decoder.step")
        return self.longest

    def check_room(self, op: str, x: Tensor, length: int) -> None:
        check = Checker(op)
        if x.shape[0] != self.lengths.shape[0]:
            check.fail("inputs_embeds", f"the cache's batch size, {self.lengths.shape[0]}", x.shape[0])
        if length > self.capacity:
            check.fail("cache", f"room for {length} positions", f"a capacity of {self.capacity}",
                       "make it with a larger capacity")


@dataclass
class LayerCache:
    """One layer of a :class:`KVCache`, and where the next positions go in it."""

    keys: Tensor
    values: Tensor
    at: slice | Tensor  # the same rows for every sample, or one row for each
    seqlens: Tensor | None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values; returns all that the queries may see."""
        for store, new in ((self.keys, k), (self.values, v)):
            if isinstance(self.at, slice):
                store[:, :, self.at] = new
            else:
                store[torch.arange(store.shape[0], device=store.device), :, self.at] = new.squeeze(2)
        end = self.at.stop if isinstance(self.at, slice) else None
        return self.keys[:, :, :end], self.values[:, :, :end]

    def visible(self, window: int | None) -> dict[str, Any]:
        """The arguments of :func:`gradmem_kernels.attention` for which of :meth:`append`'s keys the queries see."""
        if self.seqlens is None:
            return {"causal": True, "window": window}
        if window is None:
            return {"seqlens": self.seqlens}
        # each row ends at a length of its own, where no alignment of queries and keys puts the window
        keys, ends = torch.arange(self.keys.shape[2], device=self.keys.device), self.seqlens.unsqueeze(-1)
        return {"mask": ((keys < ends) & (keys >= ends - window))[:, None, None]}
