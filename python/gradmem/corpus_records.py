"""Records of a corpus to be written: read from JSON lines, refused one by one, and put into batches."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradmem.errors import DataError
from gradmem.tasks import Tokenizer
from gradmem_kernels.checks import ArgumentError

__all__ = ["BATCHES", "Failure", "Record", "Records", "Window"]

#: Batches of a window: records are put beside others of like length within so many batches of them.
BATCHES = 16


class Failure(NamedTuple):
    """A record that has no memory: its line in the corpus, from 1, its id where it has a valid one, and why."""

    line: int
    id: str | None
    reason: str


class Record(NamedTuple):
    """A record of the corpus as token ids."""

    line: int
    id: str
    token_ids: list[int]


class Window(NamedTuple):
    """Consecutive lines of a corpus, in ``batches`` of like length, and those of its records that were refused."""

    number: int
    lines: int
    batches: list[list[Record]]
    failures: list[Failure]


class Records:
    """The records of ``path``, a function of the file, ``batch_size`` and ``max_tokens`` alone.

    Each line is a JSON object with the field ``context``, a text, or ``context_ids``, a list of token ids, and
    optionally ``id``, a string or an integer; without, the number of its line is its id. Lines of white space are
    passed over.

    Args:
        path: the corpus.
        tokenizer: of texts; ``None`` where there are none.
        vocab_size: of the model.
        batch_size: records in a batch.
        max_tokens: longer contexts are refused.

    Raises:
        DataError: if the file cannot be read.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer | None, *, vocab_size: int, batch_size: int,
                 max_tokens: int | None = None) -> None:
        self.path, self.tokenizer, self.vocab_size = Path(path), tokenizer, vocab_size
        self.batch_size, self.max_tokens = batch_size, max_tokens
        digest, self.lines = hashlib.sha256(), 0
        self._digests: list[bytes] = []  # of each window
        try:
            for lines in self._parts():
                self._digests.append(_digest(lines))
                digest.update(b"".join(lines))
                self.lines += len(lines)
        except OSError as reason:
            raise DataError(f"{path}: cannot be read: {reason.strerror or reason}") from reason
        self.digest = digest.hexdigest()

    def windows(self) -> Iterator[Window]:
        """The windows in order; only one is held at a time, beside all ids.

        Raises:
            DataError: if the file is no longer what it was, before anything of the change is given out.
        """
        seen: set[str] = set()
        first = 1
        for number, (before, lines) in enumerate(itertools.zip_longest(self._digests, self._parts(), fillvalue=None)):
            if lines is None or _digest(lines) != before:
                raise DataError(f"{self.path}: expected the corpus as it was when this run began, got another from "
                                f"line {first} on; leave it as it is, or write a copy of it")
            yield self._window(number, first, lines, seen)
            first += len(lines)

    def _parts(self) -> Iterator[list[bytes]]:
        """The lines of each window."""
        with open(self.path, "rb") as file:
            while lines := list(itertools.islice(file, self.batch_size * BATCHES)):
                yield lines

    def _window(self, number: int, first: int, lines: Sequence[bytes], seen: set[str]) -> Window:
        records: list[Record] = []
        failures: list[Failure] = []
        for line, text in enumerate(lines, first):
            if not text.strip():
                continue
            found = self._record(line, text, seen)
            if isinstance(found, Record):
                records.append(found)
            else:
                failures.append(found)
        # stable: equal lengths stay in order
        records.sort(key=lambda record: len(record.token_ids))
        batches = [records[start : start + self.batch_size] for start in range(0, len(records), self.batch_size)]
        return Window(number, len(lines), batches, failures)

    def _record(self, line: int, text: bytes, seen: set[str]) -> Record | Failure:
        name: str | None = None
        try:
            entry = _parse(text)
            name = _name(entry, line)
            if name in seen:
                raise DataError(f"id: expected one that no earlier record has, got {name!r}")
            seen.add(name)
            ids = self._token_ids(entry)
        except (DataError, ArgumentError) as reason:
            return Failure(line, name, str(reason))
        return Record(line, name, ids)

    def _token_ids(self, entry: dict[str, Any]) -> list[int]:
        if ("context" in entry) == ("context_ids" in entry):
            raise DataError(f"expected one of context and context_ids, got "
                            f"{'both' if 'context' in entry else ', '.join(entry) or 'no field'}")
        if "context_ids" in entry:
            ids = entry["context_ids"]
            if not isinstance(ids, list) or any(type(i) is not int for i in ids):
                raise DataError(f"context_ids: expected a list of integers, got {_short(ids)}")
        else:
            if not isinstance(entry["context"], str):
                raise DataError(f"context: expected a string, got {_short(entry['context'])}")
            if self.tokenizer is None:
                raise DataError("context: expected context_ids where there is no tokenizer, got a text")
            ids = self.tokenizer.encode(entry["context"])
        if not ids:
            raise DataError("context: expected at least one token, got none")
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise DataError(f"context: expected at most {self.max_tokens} tokens, got {len(ids)}")
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise DataError(f"context: expected token ids in 0..{self.vocab_size - 1}, got {wrong}")
        return ids


def _digest(lines: Sequence[bytes]) -> bytes:
    return hashlib.sha256(b"".join(lines)).digest()


def _parse(text: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(text.decode("utf-8-sig"))  # some editors begin a file with a mark of the byte order
    except UnicodeDecodeError as reason:
        raise DataError(f"not UTF-8: byte {reason.object[reason.start]:#x} at position {reason.start}") from reason
    except (ValueError, RecursionError) as reason:
        raise DataError(f"not JSON: {reason}") from reason
    if not isinstance(entry, dict):
        raise DataError(f"expected an object, got {_short(entry)}")
    return entry


def _name(entry: dict[str, Any], line: int) -> str:
    name = entry.get("id", line)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise DataError(f"id: expected a string or an integer, got {_short(name)}")
    return str(name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
