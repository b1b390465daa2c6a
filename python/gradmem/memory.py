"""Written memories: the tensor, where it comes from, and its file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmem.errors import MemoryFileError
from gradmem.files import load_tensors, save_tensors
from gradmem_kernels.checks import ArgumentError, Checker

if TYPE_CHECKING:
    from gradmem.model import GradMem

__all__ = ["Memory", "Provenance", "context_hash"]

_KIND, _VERSION = "memory", 1


@dataclass(frozen=True)
class Provenance:
    """Where one memory comes from.

    ``model`` is :meth:`gradmem.GradMem.fingerprint` of the model that wrote it, ``inner_lr`` the learning rate of each
    of the ``steps``, ``context`` the :func:`context_hash` of what was written.
    """

    model: str
    steps: int
    inner_lr: tuple[float, ...]
    context: str


@dataclass(frozen=True, eq=False)
class Memory:
    """``N`` written memories: ``tensor [N, m, D]`` and one :class:`Provenance` each."""

    tensor: Tensor
    provenance: tuple[Provenance, ...]

    def __post_init__(self) -> None:
        check = Checker("Memory")
        check.tensor("tensor", self.tensor, ("N", "m", "D"))
        if len(self.provenance) != len(self.tensor):
            check.fail("provenance", f"one entry for each of the {len(self.tensor)} memories", len(self.provenance))

    def __len__(self) -> int:
        return len(self.provenance)

    def __getitem__(self, index: int | slice) -> Memory:
        """The memories of a slice; of a number, that one alone (still with its leading dimension)."""
        if isinstance(index, int):
            index = range(len(self))[index]  # raises IndexError, which also ends an iteration
            index = slice(index, index + 1)
        return Memory(self.tensor[index], self.provenance[index])

    def to(self, device: torch.device | str) -> Memory:
        return dataclasses.replace(self, tensor=self.tensor.to(device))

    @staticmethod
    def cat(memories: Sequence[Memory]) -> Memory:
        """One ``Memory`` with those of all ``memories``, in order.

        Raises:
            ArgumentError: if there are none, or they come from different models.
        """
        provenance = tuple(p for memory in memories for p in memory.provenance)
        models = {p.model for p in provenance}
        if not memories or len(models) > 1:
            raise ArgumentError(f"Memory.cat: memories: expected memories of one model, got {len(memories)} of "
                                f"{len(models)} models")
        return Memory(torch.cat([memory.tensor for memory in memories]), provenance)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; an interrupted write leaves the file that was there before.

        Raises:
            MemoryFileError: if a value is not finite.
        """
        tensor = self.tensor.detach()
        finite = torch.isfinite(tensor).flatten(1).all(1).tolist()
        if not all(finite):
            raise MemoryFileError(f"{path}: not saved: memory {finite.index(False)} is not finite; the inner learning "
                                  f"rate may be too large for its context")
        save_tensors(Path(path), _KIND, _VERSION, {"memory": tensor},
                     {"provenance": [dataclasses.asdict(p) for p in self.provenance]})

    @staticmethod
    def load(path: str | Path, model: GradMem | None = None) -> Memory:
        """Reads a file of :meth:`save`; with ``model``, to its device, and only if that model wrote it.

        Raises:
            MemoryFileError: if the file is missing, truncated, not safetensors, no memory file or of another model.
        """
        path = Path(path)
        tensors, about = load_tensors(path, _KIND, _VERSION, MemoryFileError)
        try:
            memory = Memory(tensors["memory"], tuple(_provenance(entry) for entry in about["provenance"]))
        except (ArgumentError, KeyError, TypeError) as reason:
            raise MemoryFileError(f"{path}: not a valid memory file: {reason}") from reason
        if model is None:
            return memory
        expected = model.fingerprint()
        for entry in memory.provenance:
            if entry.model != expected:
                raise MemoryFileError(
                    f"{path}: written by another model: its fingerprint is {entry.model[:12]}, this model's "
                    f"{expected[:12]}; a memory is only readable by the weights that wrote it")
        return memory.to(model.memory_init.device)


def _provenance(entry: dict[str, Any]) -> Provenance:
    return Provenance(**{**entry, "inner_lr": tuple(entry["inner_lr"])})


def context_hash(token_ids: Sequence[int]) -> str:
    """SHA-256 of the token ids (as little-endian int64), in hex."""
    return hashlib.sha256(b"".join(i.to_bytes(8, "little", signed=True) for i in token_ids)).hexdigest()
