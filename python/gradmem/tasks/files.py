"""Tasks read from files: bAbI, SQuAD, JSON lines, and text to be reconstructed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradmem.config import Config, option
from gradmem.errors import DataError
from gradmem.hub import PREFIX, load_records
from gradmem.tasks.babi import FACTS, read_babi
from gradmem.tasks.batch import IGNORE, Batch
from gradmem.tasks.examples import Example, read_text, string_field
from gradmem.tasks.jsonl import read_jsonl, record_examples
from gradmem.tasks.squad import ORDERS, read_squad, squad_examples
from gradmem.tasks.tokenizer import Tokenizer
from gradmem_kernels.checks import ArgumentError

__all__ = ["TASKS", "DataConfig", "FileTask", "Questions", "Row", "read_rows"]

TASKS = ("kv", "babi", "squad", "jsonl", "text")


@dataclass(frozen=True)
class DataConfig(Config):
    """What is learned, and the files to read it from."""

    task: str = option("kv", "what is learned", choices=TASKS)
    data: str | None = option(None, "file to train on, or hub:NAME[:CONFIGURATION]:SPLIT; kv: JSON lines with context, "
                                    "query and target in place of generated pairs")
    eval_data: str | None = option(None, "the same to evaluate on; needed with data")
    babi_facts: str = option("all", "statements that are written: all before the question, or its supporting facts",
                             choices=FACTS)
    squad_order: str = option("context-question", "whether the question is asked after the paragraph was written, or "
                                                  "written in front of it", choices=ORDERS)
    chunk_tokens: int = option(64, "tokens of a chunk of text", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None and self.task != "kv":
            self.fail("data", f"a file to train on where task is {self.task!r}", None)
        if (self.data is None) != (self.eval_data is None):
            self.fail("eval_data", "a file where data is one, else None", self.eval_data)
        for name, task in OPTION_OF.items():
            default = next(field.default for field in dataclasses.fields(self) if field.name == name)
            if self.task != task and getattr(self, name) != default:
                self.fail(name, f"{default!r}, or the task {task}, which alone has this option", getattr(self, name))


#: Tasks whose targets begin with the space between the query and the answer.
SPACED = ("babi", "squad")
#: Options that one task alone has.
OPTION_OF = {"babi_facts": "babi", "squad_order": "squad", "chunk_tokens": "text"}


class Row(NamedTuple):
    """An example as token ids; exact match counts the target's first ``counted`` tokens.

    ``answers``: the texts that are right, by which generated text is scored; none for a reconstructed chunk."""

    context: list[int]
    query: list[int]
    target: list[int]
    counted: int
    answers: tuple[str, ...] = ()


class Questions(NamedTuple):
    """``N`` contexts with a question each, right-padded: ``context_ids [N, S]``, ``query_ids [N, T]``, int64, and their
    lengths ``[N]``; ``answers``: the texts that are right, of each."""

    context_ids: Tensor
    context_lengths: Tensor
    query_ids: Tensor
    query_lengths: Tensor
    answers: list[tuple[str, ...]]


def read_rows(path: str, tokenizer: Tokenizer, config: DataConfig) -> list[Row]:
    """Reads a file, or a data set ``hub:...``, of the task ``config`` names.

    Raises:
        DataError: if it cannot be read or is not of the task's format, with the place, or has characters that the
            tokenizer does not know.
        HubError, MissingExtraError: as :func:`gradmem.hub.load_records`.
    """
    if config.task == "text":
        return _chunks(path, tokenizer, config.chunk_tokens)
    rows = []
    encode = functools.lru_cache(1)(tokenizer.encode)  # a paragraph has several questions
    for example in _examples(path, config):
        try:
            target, counted = tokenizer.encode_target(example.target)
            rows.append(Row(encode(example.context), tokenizer.encode(example.query), target, counted,
                            example.answers or (tokenizer.answer(target),)))
            if not rows[-1].context:
                raise ArgumentError("context: expected at least one token, got none")
        except ArgumentError as reason:
            raise DataError(f"{example.source}: {reason}") from reason
    if not rows:
        raise DataError(f"{path}: expected at least one record, got none")
    return rows


def _examples(path: str, config: DataConfig) -> Iterable[Example]:
    hub = path.startswith(PREFIX)
    if config.task == "babi":
        if hub:
            raise DataError(f"{path}: expected a file in bAbI's text format, got the name of a data set; download the "
                            f"files, data sets hold stories in no common form")
        return read_babi(path, config.babi_facts)
    if config.task == "squad":
        if not hub:
            return read_squad(path, config.squad_order)
        questions = ((source, string_field(record, "context", source), record)
                     for source, record in load_records(path))
        return squad_examples(questions, config.squad_order)
    return record_examples(load_records(path)) if hub else read_jsonl(path)


def _chunks(path: str, tokenizer: Tokenizer, size: int) -> list[Row]:
    """Every text in chunks of ``size`` tokens, the last one shorter: written, and asked for without a query."""
    texts = ((string_field(record, "text", source) for source, record in load_records(path))
             if path.startswith(PREFIX) else [read_text(path)])
    rows = []
    for text in texts:
        ids = tokenizer.encode(text)
        rows += [Row(chunk, [], [*chunk, tokenizer.end_id], len(chunk))
                 for chunk in (ids[start : start + size] for start in range(0, len(ids), size))]
    if not rows:
        raise DataError(f"{path}: expected text, got none")
    return rows


def _digest(*parts: Sequence[Row]) -> str:
    """SHA-256 of what is learned from: without the answers that generated text is scored by.

    It is that of ``repr`` of the lists of rows, which are not all written out at once.
    """
    digest = hashlib.sha256()
    for i, rows in enumerate(parts):
        digest.update(b"], [" if i else b"[[")
        for j, row in enumerate(rows):
            digest.update(f"{', ' if j else ''}{tuple(row[:4])!r}".encode())
    digest.update(b"]]")
    return digest.hexdigest()


class FileTask:
    """Batches of examples from files. Each training batch is a function of ``seed`` and its number alone.

    Args:
        rows: to train on (or only to evaluate on, where there are no others).
        tokenizer: made the rows.
        held_out: rows to evaluate on.
        seed: of the order in which training sees the examples.
    """

    levels = 1

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer, held_out: Sequence[Row] | None = None,
                 seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self._train = rows
        self._held_out = rows if held_out is None else held_out
        self.digest = _digest(self._train, self._held_out)

    def __len__(self) -> int:
        """Examples to evaluate on."""
        return len(self._held_out)

    @property
    def scored(self) -> bool:
        """Whether the right answers to evaluate on are known as texts; chunks of a text have none."""
        return all(row.answers for row in self._held_out)

    @property
    def longest_context(self) -> int:
        """Tokens of the longest context of a training batch."""
        return max(len(row.context) for row in self._train)

    def batch(self, step: int, size: int, *, queries: int = 1, level: int | None = None) -> Batch:
        """Training batch number ``step``: ``size`` examples drawn with replacement, one query each."""
        if queries != 1 or level not in (None, 1):
            raise ArgumentError(f"FileTask: expected queries=1 and no curriculum, got queries={queries}, "
                                f"level={level}; an example has one query")
        rng = np.random.default_rng([self.seed, step])
        return self._collate([self._train[i] for i in rng.integers(0, len(self._train), size)])

    def held_out(self, samples: int, batch_size: int) -> Iterator[Batch]:
        """The first ``samples`` examples to evaluate on, in order."""
        chosen = self._held_out[:samples]
        for start in range(0, len(chosen), batch_size):
            yield self._collate(chosen[start : start + batch_size])

    def questions(self, samples: int, batch_size: int) -> Iterator[Questions]:
        """The same examples to evaluate on, without their targets.

        Raises:
            ArgumentError: for rows without answers, as chunks of text are.
        """
        chosen = self._held_out[:samples]
        if not self.scored:
            raise ArgumentError("FileTask: rows: expected rows with answers, got at least one without; chunks of text "
                                "have none, and token accuracy tells how well they are reconstructed")
        for start in range(0, len(chosen), batch_size):
            rows = chosen[start : start + batch_size]
            contexts, context_lengths = self._padded([row.context for row in rows])
            queries, query_lengths = self._padded([row.query for row in rows])
            yield Questions(contexts, context_lengths, queries, query_lengths, [row.answers for row in rows])

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest right answer to evaluate on, and two for what stands before it and its end."""
        return max(max(len(self.tokenizer.encode(text)) for text in row.answers)
                   for row in self._held_out) + 2

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return ids, torch.tensor([len(row) for row in rows])

    def _collate(self, rows: Sequence[Row]) -> Batch:
        size, pad = len(rows), self.tokenizer.pad_id
        contexts, context_lengths = self._padded([row.context for row in rows])
        ids = torch.full((size, 1, max(len(row.query) + len(row.target) for row in rows)), pad)
        labels, mask = torch.full_like(ids, IGNORE), torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            start, stop = len(row.query), len(row.query) + len(row.target)
            ids[i, 0, :stop] = torch.tensor([*row.query, *row.target])
            labels[i, 0, start:stop] = ids[i, 0, start:stop]
            mask[i, 0, start : start + row.counted] = True
        return Batch(contexts, context_lengths, ids, labels, mask)
