"""Questions on paragraphs in the JSON format of SQuAD 1.1 and 2.0 (Rajpurkar et al., arXiv 1606.05250, 1806.03822)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gradmem.errors import DataError
from gradmem.tasks.examples import Example, read_text, string_field

__all__ = ["ORDERS", "read_squad", "squad_examples"]

ORDERS = ("context-question", "question-context")


def read_squad(path: str | Path, order: str = "context-question") -> list[Example]:
    """One example for each question. The target is a space and its first answer, or empty where there is no answer.

    Args:
        path: a file such as ``train-v2.0.json``.
        order: ``"context-question"``: the paragraph is written, the question is the query. ``"question-context"``: the
            question, a new line and the paragraph are written, and the query is empty.

    Raises:
        DataError: if the file cannot be read, is no JSON (with the line) or is not of the format (with the place).
    """
    try:
        document = json.loads(read_text(path))
    except json.JSONDecodeError as reason:
        raise DataError(f"{path}:{reason.lineno}: not JSON: {reason}") from reason
    examples = list(squad_examples(_questions(document, str(path)), order))
    if not examples:
        raise DataError(f"{path}: expected at least one question, got none")
    return examples


def squad_examples(questions: Iterable[tuple[str, str, Any]], order: str) -> Iterator[Example]:
    """An example of each ``(source, paragraph, question)``; a question's ``answers`` may be a list of objects, or an
    object of lists, as hub data sets have them."""
    for source, paragraph, entry in questions:
        question, answers = string_field(entry, "question", source), _answers(entry, paragraph, source)
        target = f" {answers[0]}" if answers[0] else ""
        if order == "context-question":
            yield Example(paragraph, question, target, source, answers)
        else:
            yield Example(f"{question}\n{paragraph}", "", target, source, answers)


def _questions(document: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    for i, article in enumerate(_list_field(document, "data", path)):
        source = f"{path}: data[{i}]"
        for j, paragraph in enumerate(_list_field(article, "paragraphs", source)):
            source = f"{path}: data[{i}].paragraphs[{j}]"
            context = string_field(paragraph, "context", source)
            if not context.strip():
                raise DataError(f"{source}: context: expected a paragraph, got {context!r}")
            for k, question in enumerate(_list_field(paragraph, "qas", source)):
                yield f"{source}.qas[{k}]", context, question


def _answers(entry: dict[str, Any], paragraph: str, source: str) -> tuple[str, ...]:
    """All of them, the target first; of a question without an answer, the empty one."""
    answers = entry.get("answers")
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise DataError(f"{source}: answers: expected lists 'text' and 'answer_start' of one length, got "
                            f"{answers!r}")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(answers, list):
        raise DataError(f"{source}: answers: expected a list, got {type(answers).__name__}; questions without answers "
                        f"to learn from, as in a test set, cannot be used")
    if entry.get("is_impossible", False):
        return ("",)
    if not answers:
        if "is_impossible" in entry:
            raise DataError(f"{source}: answers: expected at least one where is_impossible is false, got none")
        return ("",)  # a hub data set says it by an empty list
    text = string_field(answers[0], "text", f"{source}.answers[0]")
    start = answers[0].get("answer_start")
    if not text.strip():
        raise DataError(f"{source}.answers[0]: text: expected an answer, got {text!r}")
    if type(start) is not int or start < 0 or not paragraph.startswith(text, start):
        found = f", where {paragraph[start : start + len(text)]!r} stands" if type(start) is int and start >= 0 else ""
        raise DataError(f"{source}.answers[0]: answer_start: expected the position of {text!r} in the context, got "
                        f"{start!r}{found}; positions count characters from 0")
    others = (string_field(answer, "text", f"{source}.answers[{i}]") for i, answer in enumerate(answers[1:], 1))
    return (text, *others)


def _list_field(entry: Any, name: str, source: str) -> list[Any]:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, list):
        got = f"{type(value).__name__}" if isinstance(entry, dict) else f"no object but {type(entry).__name__}"
        raise DataError(f"{source}: {name}: expected a list, got {got}; the format is "
                        f"data[].paragraphs[].qas[], with a context in each paragraph")
    return value
