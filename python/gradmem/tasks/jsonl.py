"""Contexts, queries and targets, one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gradmem.errors import DataError
from gradmem.tasks.examples import Example, read_text, string_field

__all__ = ["read_jsonl", "record_examples"]


def read_jsonl(path: str | Path) -> list[Example]:
    """Reads objects with the string fields ``context``, ``query`` and ``target``; other fields are ignored.

    Raises:
        DataError: if the file cannot be read or is empty, or a line is not such an object, with the line's number.
    """
    return list(record_examples(_records(path)))


def record_examples(records: Iterable[tuple[str, Any]]) -> Iterator[Example]:
    """An example of each record; the records come with what names them in a message."""
    for source, entry in records:
        context, query, target = (string_field(entry, name, source) for name in ("context", "query", "target"))
        if not context or not target:
            raise DataError(f"{source}: expected a context and a target that are not empty")
        yield Example(context, query, target, source)


def _records(path: str | Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as reason:
                raise DataError(f"{path}:{number}: not JSON: {reason}; expected one object on each line") from reason
