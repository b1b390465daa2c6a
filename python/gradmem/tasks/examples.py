"""What the readers of files have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradmem.errors import DataError

__all__ = ["Example", "read_text", "string_field"]


@dataclass(frozen=True)
class Example:
    """What is written, what is asked, and the answer; ``source`` says where they stand, for messages.

    ``answers``: all texts that are right, where they are not the target alone."""

    context: str
    query: str
    target: str
    source: str
    answers: tuple[str, ...] = ()


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        DataError: if it cannot be read, is no UTF-8 or holds nothing but white space.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark of the byte order
    except UnicodeDecodeError as reason:
        line = reason.object[: reason.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: cannot be read: expected UTF-8 text, got byte "
                        f"{reason.object[reason.start]:#x}; convert the file to UTF-8") from reason
    except OSError as reason:
        raise DataError(f"{path}: cannot be read: {reason.strerror or reason}") from reason
    if not text.strip():
        raise DataError(f"{path}: expected at least one line, got none")
    return text


def string_field(entry: Any, name: str, source: str) -> str:
    """``entry[name]``.

    Raises:
        DataError: if ``entry`` is no object, or that is no string.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{source}: expected an object, got {type(entry).__name__}")
    value = entry.get(name)
    if not isinstance(value, str):
        raise DataError(f"{source}: {name}: expected a string, got {value!r}")
    return value
