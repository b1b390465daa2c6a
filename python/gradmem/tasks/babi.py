"""bAbI stories in their text format (Weston et al., arXiv 1502.05698).

Each line is a number, which starts again from 1 with each story, and a statement or a question; after a question come,
separated by tabs, its answer and the numbers of the statements that support it::

    1 Mary moved to the bathroom.
    2 John went to the hallway.
    3 Where is Mary?        bathroom        1
"""

from __future__ import annotations

import re
from pathlib import Path

from gradmem.errors import DataError
from gradmem.tasks.examples import Example, read_text

__all__ = ["FACTS", "read_babi"]

FACTS = ("all", "supporting")


def read_babi(path: str | Path, facts: str = "all") -> list[Example]:
    """One example for each question: the statements before it, one a line; the question; a space and the answer.

    Args:
        path: a file such as ``qa1_single-supporting-fact_train.txt``.
        facts: ``"all"`` statements, or only those that the question names as ``"supporting"``.

    Raises:
        DataError: if the file cannot be read or has no question, or a line is not of the format, with its number.
    """
    examples: list[Example] = []
    statements: dict[int, str] = {}
    previous = 0
    for line_number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        source = f"{path}:{line_number}"
        match = re.fullmatch(r"(\d+) +(\S.*?)\s*", line)
        if match is None:
            raise DataError(f"{source}: expected a number, a space and a sentence, as in '1 Mary moved to the "
                            f"bathroom.', got {line[:40]!r}")
        number, text = int(match[1]), match[2]
        if number not in (1, previous + 1):
            raise DataError(f"{source}: expected line number {previous + 1}, or 1 for a new story, got {number}")
        if number == 1:
            statements = {}
        previous = number
        if "\t" in text:
            examples.append(_question(text.split("\t"), statements, facts, source))
        elif text.endswith("?"):
            raise DataError(f"{source}: expected a question followed by a tab and its answer, got {text[:40]!r}; "
                            f"editors that replace tabs by spaces break this format")
        else:
            statements[number] = text
    if not examples:
        raise DataError(f"{path}: expected at least one question, a line with tabs before its answer and its "
                        f"supporting facts, got none")
    return examples


def _question(parts: list[str], statements: dict[int, str], facts: str, source: str) -> Example:
    question, answer, *rest = (part.strip() for part in parts)
    if not question or not answer or len(rest) > 1:
        raise DataError(f"{source}: expected a question, its answer and the numbers of its supporting facts, separated "
                        f"by tabs, got {len(parts)} parts, of which the first two are {question!r} and {answer!r}")
    if not statements:
        raise DataError(f"{source}: expected a statement before the first question of a story, got none")
    supports = rest[0].split() if rest else []
    for support in supports:
        if not support.isdecimal() or int(support) not in statements:
            raise DataError(f"{source}: supporting facts: expected numbers of statements before the question, of "
                            f"{', '.join(map(str, statements))}, got {support!r}")
    if facts == "supporting":
        if not supports:
            raise DataError(f"{source}: supporting facts: expected at least one, got none; use all facts (babi_facts)")
        chosen = [statements[number] for number in sorted({int(support) for support in supports})]
    else:
        chosen = list(statements.values())
    return Example("\n".join(chosen), question, f" {answer}", source)
