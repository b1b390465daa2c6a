"""Written memories: the tensor, where it comes from, its file, and how it is read elsewhere."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmem import export
from gradmem.errors import MemoryFileError
from gradmem.files import load_tensors, save_tensors
from gradmem_kernels.checks import ArgumentError, Checker

if TYPE_CHECKING:
    from gradmem.model import GradMem

__all__ = ["Memory", "Provenance", "context_hash"]

KIND, VERSION = "memory", 1


@dataclass(frozen=True)
class Provenance:
    """Where one memory comes from.

    ``model`` is :meth:`gradmem.GradMem.fingerprint` of the model that wrote it, ``inner_lr`` the learning rate of each
    of the ``steps``, or of each step's ``m`` vectors, ``context`` the :func:`context_hash` of what was written,
    ``inner_optimizer`` the rule of the steps with its options, empty in files from before there were several.
    """

    model: str
    steps: int
    inner_lr: tuple[float, ...] | tuple[tuple[float, ...], ...]
    context: str
    inner_optimizer: str = ""


@dataclass(frozen=True, eq=False)
class Memory:
    """``N`` written memories: ``tensor [N, m, D]`` and one :class:`Provenance` each, kept by every method.

    ``model`` reads them, where it is at hand: :meth:`gradmem.GradMem.write` and :meth:`load` set it. Files, pickles and
    copies leave it out.
    """

    tensor: Tensor
    provenance: tuple[Provenance, ...]
    model: GradMem | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        check = Checker("Memory")
        check.tensor("tensor", self.tensor, ("N", "m", "D"))
        if len(self.provenance) != len(self.tensor):
            check.fail("provenance", f"one entry for each of the {len(self.tensor)} memories", len(self.provenance))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}

    def __len__(self) -> int:
        return len(self.provenance)

    def __getitem__(self, index: int | slice | Sequence[int] | Sequence[bool] | Tensor) -> Memory:
        """The memories of a slice, of positions or of a mask; of a number, that one alone.

        The leading dimension stays. ``index`` may be an integer, a slice, or a list or 1-D tensor of integers (any
        order, repeated or not) or of ``N`` booleans.

        Raises:
            IndexError: for a position that there is none of, or a mask of another length.
            ArgumentError: for an index of another type.
        """
        if isinstance(index, int):
            index = range(len(self))[index]  # raises IndexError, which also ends an iteration
            index = slice(index, index + 1)
        if isinstance(index, slice):
            return dataclasses.replace(self, tensor=self.tensor[index], provenance=self.provenance[index])
        chosen = self._positions(index)
        return dataclasses.replace(self, tensor=self.tensor[chosen],
                                   provenance=tuple(self.provenance[i] for i in chosen))

    def _positions(self, index: Any) -> list[int]:
        if isinstance(index, (list, tuple)):
            index = torch.tensor(index) if len(index) else torch.empty(0, dtype=torch.int64)
        if (not isinstance(index, Tensor) or index.ndim != 1
                or index.dtype not in (torch.bool, torch.int64, torch.int32)):
            got = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            Checker("Memory").fail("index", "an integer, a slice, or a list or 1-D tensor of integers or booleans", got)
        return torch.arange(len(self))[index.cpu()].tolist()

    def to(self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None) -> Memory:
        """The memories on ``device`` and in ``dtype``, a floating point one; ``None`` leaves either as it is."""
        return dataclasses.replace(self, tensor=self.tensor.to(device=device, dtype=dtype))

    @staticmethod
    def cat(memories: Sequence[Memory]) -> Memory:
        """One ``Memory`` with those of all ``memories``, in order.

        Raises:
            ArgumentError: if there are none, or they come from different models or differ in dtype or device.
        """
        provenance = tuple(p for memory in memories for p in memory.provenance)
        models = {p.model for p in provenance}
        if not memories or len(models) > 1:
            raise ArgumentError(f"Memory.cat: memories: expected memories of one model, got {len(memories)} of "
                                f"{len(models)} models")
        check = Checker("Memory.cat")
        for number, memory in enumerate(memories):
            check.tensor(f"memories[{number}]", memory.tensor, ("...", "m", "D"))
        reader = next((memory.model for memory in memories if memory.model is not None), None)
        return Memory(torch.cat([memory.tensor for memory in memories]), provenance, reader)

    def prompt_embeds(self, query_ids: Tensor) -> Tensor:
        """What servers take as input embeddings: :meth:`gradmem.GradMem.prompt_embeds` of ``model``.

        Args:
            query_ids: ``[N, T]`` int64, or ``[N, n, T]`` for ``n`` queries of each memory; ``T`` may be 0.

        Returns:
            ``[N, P + T, D]`` or ``[N, n, P + T, D]``, of the model's dtype.

        Raises:
            ArgumentError: without a ``model``, for one that has changed since, and as there.
        """
        return self._reader("Memory.prompt_embeds").prompt_embeds(self, query_ids)

    def export_peft(self, path: str | Path, *, base_model: str | None = None) -> None:
        """Writes this one memory as a prompt-tuning adapter of ``peft`` into the directory ``path``.

        ``PeftModel.from_pretrained(base, path)`` then computes what :meth:`gradmem.GradMem.read` does. ``base`` is the
        backbone with the weights it has now: a backbone that was trained has to be saved beside it. ``peft`` is not
        needed for writing.

        Args:
            path: directory, made if missing; its ``adapter_config.json`` and ``adapter_model.safetensors`` are
                replaced.
            base_model: name or path of the backbone, for the adapter's configuration; default: what the backbone was
                loaded from.

        Raises:
            ArgumentError: unless there is one memory, with a ``model`` that has not changed since, whose backbone is a
                model of ``transformers`` without active adapters.
            MemoryFileError: if a value is not finite.
        """
        if len(self) != 1:
            Checker("Memory.export_peft").fail("memory", "one memory", len(self),
                                               "export memory[i], each to a directory of its own")
        export.export_peft(self, self._reader("Memory.export_peft"), Path(path), base_model)

    def _reader(self, op: str) -> GradMem:
        check = Checker(op)
        if self.model is None:
            check.fail("model", "the model that reads the memory", "none",
                       "take the memory from GradMem.write or from Memory.load(path, model)")
        found = self.model.fingerprint()
        for entry in self.provenance:
            if entry.model != found:
                check.fail("model", f"the weights that wrote the memory, fingerprint {entry.model[:12]}", found[:12],
                           "write the memory again with the weights as they are")
        return self.model

    def save(self, path: str | Path, *, more: Mapping[str, Any] | None = None) -> None:
        """Writes a safetensors file; an interrupted write leaves the file that was there before.

        Args:
            path: of the file.
            more: what its description shall hold beside the provenance, in types that JSON has.

        Raises:
            MemoryFileError: if a value is not finite.
        """
        self.check_finite(path)
        save_tensors(Path(path), KIND, VERSION, {"memory": self.tensor.detach()},
                     {**self.about(), **(more or {})})

    def check_finite(self, path: str | Path) -> None:
        """
        Raises:
            MemoryFileError: naming ``path``, if a value is not finite.
        """
        finite = torch.isfinite(self.tensor.detach()).flatten(1).all(1).tolist()
        if not all(finite):
            raise MemoryFileError(f"{path}: not saved: memory {finite.index(False)} is not finite; the inner learning "
                                  f"rate may be too large for its context")

    def about(self) -> dict[str, Any]:
        """The provenance, in types that JSON has."""
        return {"provenance": [dataclasses.asdict(p) for p in self.provenance]}

    @staticmethod
    def load(path: str | Path, model: GradMem | None = None) -> Memory:
        """Reads a file of :meth:`save`; with ``model``, to its device, and only if that model wrote it.

        Raises:
            MemoryFileError: if the file is missing, truncated, not safetensors, no memory file or of another model.
        """
        path = Path(path)
        tensors, about = load_tensors(path, KIND, VERSION, MemoryFileError)
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
        return dataclasses.replace(memory.to(model.memory_init.device), model=model)


def _provenance(entry: dict[str, Any]) -> Provenance:
    rates = tuple(tuple(rate) if isinstance(rate, list) else rate for rate in entry["inner_lr"])
    return Provenance(**{**entry, "inner_lr": rates})


def context_hash(token_ids: Sequence[int]) -> str:
    """SHA-256 of the token ids (as little-endian int64), in hex."""
    return hashlib.sha256(b"".join(i.to_bytes(8, "little", signed=True) for i in token_ids)).hexdigest()
