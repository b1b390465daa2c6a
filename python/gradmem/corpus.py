"""A folder of memories: what was written of a corpus, read record by record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmem.corpus_records import Failure
from gradmem.errors import MemoryFileError
from gradmem.files import load_about
from gradmem.memory import KIND, VERSION, Memory

if TYPE_CHECKING:
    from gradmem.model import GradMem

__all__ = ["FAILURES", "MANIFEST", "Manifest", "MemoryCorpus", "Shard", "shard_name"]

MANIFEST, FAILURES = "corpus.json", "failures.jsonl"
_KIND, _VERSION = "corpus", 1


def shard_name(window: int, batch: int) -> str:
    """The file of a batch: an ordinary memory file, whose description names its records."""
    return f"memories-{window:07d}-{batch:02d}.safetensors"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the memories of a folder are made of; a run goes on only where all of it is the same.

    Attributes:
        model: :meth:`gradmem.GradMem.fingerprint`, the weights that read the memories.
        writer: SHA-256 over all parameters and the configuration, those of WRITE alone included.
        steps: inner steps.
        corpus: SHA-256 of the corpus file.
        lines: of that file.
        batch_size, max_tokens: as :class:`gradmem.corpus_records.Records`.
    """

    model: str
    writer: str
    steps: int
    corpus: str
    lines: int
    batch_size: int
    max_tokens: int | None

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """
        Raises:
            MemoryFileError: if the folder holds no memories of a corpus.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if (values.pop("kind"), values.pop("version")) != (_KIND, _VERSION):
                raise ValueError(f"expected version {_VERSION} of the {_KIND} format")
            return cls(**values)
        except OSError as reason:
            raise MemoryFileError(f"{path}: cannot be read: {reason.strerror or reason}; is {folder} a folder that "
                                  f"gradmem write --input made?") from reason
        except (ValueError, KeyError, TypeError, AttributeError) as reason:
            raise MemoryFileError(f"{path}: not a description of a corpus: {reason}") from reason

    def text(self) -> str:
        return json.dumps({"kind": _KIND, "version": _VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a shard file says of itself.

    Attributes:
        ids: of its memories, in order.
        contexts: of these, as :func:`gradmem.memory.context_hash` has them.
        failures: records of its batch that have no memory; in the first shard of a window, those too that were refused.
        lines: of the corpus in its window.
        batches: of its window.
        attempts: how often what failed was tried.
    """

    ids: tuple[str, ...]
    contexts: tuple[str, ...]
    failures: tuple[Failure, ...]
    lines: int
    batches: int
    attempts: int = 1

    def about(self) -> dict[str, Any]:
        """What the provenance of its memories does not say."""
        values = dataclasses.asdict(self)
        del values["contexts"]
        return {"shard": values}

    @classmethod
    def load(cls, path: Path) -> Shard:
        """
        Raises:
            MemoryFileError: if the file is not a whole shard.
        """
        about = load_about(path, KIND, VERSION, MemoryFileError)
        try:
            values = about["shard"]
            values["ids"] = tuple(values["ids"])
            values["failures"] = tuple(Failure(*failure) for failure in values["failures"])
            return cls(contexts=tuple(entry["context"] for entry in about["provenance"]), **values)
        except (KeyError, TypeError) as reason:
            raise MemoryFileError(f"{path}: expected a shard of a corpus, got another memory file") from reason


class MemoryCorpus:
    """The memories that ``gradmem write --input`` has made so far of a corpus, by the ids of its records.

    Opening it reads the shards' headers, once; a memory is read when it is asked for.

    Args:
        folder: where they are.
        model: to read them with: they come to its device, and must have been written by it.
        attempts: how often what failed must have been tried before nothing is left to do.

    Raises:
        MemoryFileError: if ``folder`` is not such a folder, a shard is damaged, or it is of another model.
    """

    def __init__(self, folder: str | Path, model: GradMem | None = None, *, attempts: int = 1) -> None:
        self.folder, self.model = Path(folder), model
        self.manifest = Manifest.load(self.folder)
        if model is not None and model.fingerprint() != self.manifest.model:
            raise MemoryFileError(
                f"{self.folder}: written by another model: its fingerprint is {self.manifest.model[:12]}, this model's "
                f"{model.fingerprint()[:12]}; a memory is only readable by the weights that wrote it")
        self._places: dict[str, tuple[Path, int]] = {}
        found: list[Failure] = []
        tried: list[int] = []
        windows: dict[str, tuple[int, int, int]] = {}  # lines, batches, shards that are there
        for path in sorted(self.folder.glob("memories-*.safetensors")):
            shard = Shard.load(path)
            self._places.update({name: (path, row) for row, name in enumerate(shard.ids)})
            found += shard.failures
            tried += [shard.attempts] if shard.failures else []
            window = path.name.rpartition("-")[0]
            windows[window] = shard.lines, shard.batches, windows.get(window, (0, 0, 0))[2] + 1
        #: records that have no memory, in the order of the corpus
        self.failures: tuple[Failure, ...] = tuple(sorted(found))
        #: how often each of them was tried, at least; 0 where there are none
        self.attempts: int = min(tried, default=0)
        whole = all(batches == there for _, batches, there in windows.values())
        #: whether every record of the corpus was written, or is among the failures and was tried often enough
        self.complete: bool = (whole and sum(lines for lines, _, _ in windows.values()) == self.manifest.lines
                               and (not found or self.attempts >= attempts))

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        """The ids, shard by shard."""
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Memory:
        """The memory of the record ``name``, alone.

        Raises:
            MemoryFileError: if there is none, with the reason where it failed.
        """
        if name not in self._places:
            reason = next((f"it failed: {failure.reason}" for failure in self.failures if failure.id == name),
                          "the corpus has no such record" if self.complete else "it is not written yet")
            raise MemoryFileError(f"{self.folder}: no memory of {name!r}: {reason}")
        path, row = self._places[name]
        return Memory.load(path, self.model)[row]
