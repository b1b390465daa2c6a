"""Contexts, queries and targets read from a file: one JSON object per line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradmem.errors import DataError
from gradmem.tasks.batch import IGNORE, Batch
from gradmem.tasks.kv import END
from gradmem.tasks.tokenizer import CharTokenizer
from gradmem_kernels.checks import ArgumentError

__all__ = ["Example", "JsonlTask", "read_jsonl"]


@dataclass(frozen=True)
class Example:
    """Line number ``line`` of a file. The value is ``target`` without a final ``!|``."""

    context: str
    query: str
    target: str
    line: int


def read_jsonl(path: str | Path) -> list[Example]:
    """Reads objects with the string fields ``context``, ``query`` and ``target``; other fields are ignored.

    Raises:
        DataError: if the file cannot be read or is empty, or a line is not such an object, with the line's number.
    """
    examples = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as reason:
        raise DataError(f"{path}: cannot be read: {reason}") from reason
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as reason:
            raise DataError(f"{path}:{number}: not JSON: {reason}") from reason
        if not isinstance(entry, dict):
            raise DataError(f"{path}:{number}: expected an object, got {type(entry).__name__}")
        for name in ("context", "query", "target"):
            if not isinstance(entry.get(name), str):
                raise DataError(f"{path}:{number}: {name}: expected a string, got {entry.get(name)!r}")
        if not entry["context"] or not entry["target"].removesuffix(END):
            raise DataError(f"{path}:{number}: expected a context and a value that are not empty")
        examples.append(Example(entry["context"], entry["query"], entry["target"], number))
    if not examples:
        raise DataError(f"{path}: expected at least one line, got none")
    return examples


class JsonlTask:
    """Batches of examples from files. Each training batch is a function of ``seed`` and its number alone.

    Args:
        path: file to train on (or only to evaluate on, where there is no other).
        tokenizer: its vocabulary must hold every character of the files.
        held_out_path: file to evaluate on.
        seed: of the order in which training sees the examples.

    Raises:
        DataError: as :func:`read_jsonl`, and for characters outside the vocabulary.
    """

    levels = 1

    def __init__(self, path: str | Path, tokenizer: CharTokenizer, held_out_path: str | Path | None = None,
                 seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self._train = self._encode(path)
        self._held_out = self._train if held_out_path is None else self._encode(held_out_path)
        self.digest = hashlib.sha256(repr((self._train, self._held_out)).encode()).hexdigest()

    def __len__(self) -> int:
        """Examples to evaluate on."""
        return len(self._held_out)

    @property
    def longest_context(self) -> int:
        """Tokens of the longest context of a training batch."""
        return max(len(context) for context, *_ in self._train)

    def batch(self, step: int, size: int, *, queries: int = 1, level: int | None = None) -> Batch:
        """Training batch number ``step``: ``size`` examples drawn with replacement, one query each."""
        if queries != 1 or level not in (None, 1):
            raise ArgumentError(f"JsonlTask: expected queries=1 and no curriculum, got queries={queries}, "
                                f"level={level}; an example has one query")
        rng = np.random.default_rng([self.seed, step])
        return self._collate([self._train[i] for i in rng.integers(0, len(self._train), size)])

    def held_out(self, samples: int, batch_size: int) -> Iterator[Batch]:
        """The first ``samples`` examples to evaluate on, in order."""
        chosen = self._held_out[:samples]
        for start in range(0, len(chosen), batch_size):
            yield self._collate(chosen[start : start + batch_size])

    def _encode(self, path: str | Path) -> list[tuple[list[int], list[int], list[int], int]]:
        """``context, query, target`` as token ids and the length of the value."""
        rows = []
        for example in read_jsonl(path):
            try:
                rows.append((self.tokenizer.encode(example.context), self.tokenizer.encode(example.query),
                             self.tokenizer.encode(example.target), len(example.target.removesuffix(END))))
            except ArgumentError as reason:
                raise DataError(f"{path}:{example.line}: {reason}") from reason
        return rows

    def _collate(self, rows: Sequence[tuple[list[int], list[int], list[int], int]]) -> Batch:
        size, pad = len(rows), self.tokenizer.pad_id
        contexts = torch.full((size, max(len(context) for context, *_ in rows)), pad)
        ids = torch.full((size, 1, max(len(query) + len(target) for _, query, target, _ in rows)), pad)
        labels, mask = torch.full_like(ids, IGNORE), torch.zeros(ids.shape, dtype=torch.bool)
        for i, (context, query, target, value) in enumerate(rows):
            start, stop = len(query), len(query) + len(target)
            contexts[i, : len(context)] = torch.tensor(context)
            ids[i, 0, :stop] = torch.tensor(query + target)
            labels[i, 0, start:stop] = ids[i, 0, start:stop]
            mask[i, 0, start : start + value] = True
        return Batch(contexts, torch.tensor([len(context) for context, *_ in rows]), ids, labels, mask)
