"""Key-value retrieval in the format of the GradMem paper (Kuratov et al., arXiv 2603.13875).

The context holds pairs ``!key:value!``, the query ``?!key:`` asks for one of them and the target is ``value!|``::

    context  !k:3!!a:7!|      query  ?!a:      target  7!|

Keys are unique in a context, values may repeat. Filler characters stand at random places between pairs. The context is
one segment or several, each of which ends with ``|``; pairs and filler are spread over them evenly.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gradmem.config import Config, option
from gradmem.tasks.batch import IGNORE, Batch
from gradmem.tasks.tokenizer import CharTokenizer
from gradmem_kernels.checks import ArgumentError

__all__ = ["END", "KVConfig", "KVTask", "KVTokenizer"]

SYNTAX = "!:?|"
END = "!|"  # follows the value in the target
_ALPHABET = string.digits + string.ascii_letters
_TRAIN, _HELD_OUT = 0, 1


@dataclass(frozen=True)
class KVConfig(Config):
    """Shape of the key-value task."""

    alphabet_size: int = option(62, "characters that keys and values are made of: digits, then letters", minimum=2,
                                maximum=len(_ALPHABET))
    key_length: int = option(2, "characters of a key", minimum=1)
    value_length: int = option(2, "characters of a value", minimum=1)
    pairs: int = option(4, "pairs in a context", minimum=1)
    filler: int = option(0, "random characters between the pairs of a context, in all", minimum=0)
    segments: int = option(1, "segments of a context", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alphabet_size ** self.key_length >= 2**63:
            self.fail("key_length", f"at most 63 bits of keys over {self.alphabet_size} characters", self.key_length)
        if self.pairs > self.alphabet_size ** self.key_length:
            self.fail("pairs", f"at most the {self.alphabet_size ** self.key_length} different keys", self.pairs)
        if self.segments > self.pairs + self.filler:
            self.fail("segments", f"at most pairs + filler = {self.pairs + self.filler}", self.segments)

    @property
    def chance(self) -> float:
        """Exact match of guessing."""
        return float(self.alphabet_size) ** -self.value_length


class KVTokenizer(CharTokenizer):
    """Characters of keys and values, and the format's own. Answers end with ``!|``, which exact match leaves out.

    Args:
        alphabet: characters of keys and values.
    """

    def __init__(self, alphabet: str) -> None:
        super().__init__(SYNTAX + alphabet)
        (self.end_id,) = self.encode(END[-1])

    def encode_target(self, text: str) -> tuple[list[int], int]:
        """
        Raises:
            ArgumentError: for a target without a value, or a character that is not in the vocabulary.
        """
        value = text.removesuffix(END)
        if not value:
            raise ArgumentError(f"KVTokenizer: target: expected a value before {END!r}, got {text!r}")
        return self.encode(text), len(value)

    def answer(self, ids: Iterable[int]) -> str:
        return self.decode(ids).split(END[-1])[0].removesuffix(END[:-1])


class KVTask:
    """Batches of the key-value task. Each is a function of ``seed`` and its number alone."""

    def __init__(self, config: KVConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.alphabet = _ALPHABET[: config.alphabet_size]
        self.tokenizer = KVTokenizer(self.alphabet)

    @property
    def levels(self) -> int:
        """The hardest level of a curriculum: the number of pairs."""
        return self.config.pairs

    @property
    def longest_context(self) -> int:
        """Tokens of the longest context of a training batch."""
        return self.batch(0, 1).context_ids.shape[1]

    def batch(self, step: int, size: int, *, queries: int = 1, level: int | None = None) -> Batch:
        """Training batch number ``step``: ``size`` contexts of ``level`` pairs (default: all), with queries for
        ``queries`` different keys each, or for all its keys where it has fewer."""
        return self._generate(_TRAIN, step, size, queries, self.config.pairs if level is None else level)

    def held_out(self, samples: int, batch_size: int) -> Iterator[Batch]:
        """``samples`` contexts with one query each, from a random stream that training never sees.

        Sample number ``i`` is the same whatever the batch size.
        """
        for start in range(0, samples, batch_size):
            yield Batch.cat([self._generate(_HELD_OUT, number, 1, 1, self.config.pairs)
                             for number in range(start, min(start + batch_size, samples))])

    def text(self, number: int) -> tuple[str, list[tuple[str, str]]]:
        """Held-out context ``number`` as text, with all its keys and values."""
        batch = self._generate(_HELD_OUT, number, 1, self.config.pairs, self.config.pairs)
        pairs = []
        for ids in batch.query_ids[0].tolist():
            key, value = self.tokenizer.decode(ids).removeprefix("?!").removesuffix(END).split(":")
            pairs.append((key, value))
        return self.tokenizer.decode(batch.context_ids[0].tolist()), pairs

    def _generate(self, stream: int, step: int, size: int, queries: int, level: int) -> Batch:
        cfg = self.config
        if not 1 <= level <= cfg.pairs:
            raise ArgumentError(f"KVTask: level: expected 1 to pairs={cfg.pairs}, got {level}")
        rng = np.random.default_rng([self.seed, stream, step])
        keys = self._digits(_distinct(rng, size, level, cfg.alphabet_size ** cfg.key_length), cfg.key_length)
        values = rng.integers(0, cfg.alphabet_size, (size, level, cfg.value_length))
        keys, values = keys + 1 + len(SYNTAX), values + 1 + len(SYNTAX)  # token ids
        contexts = self._contexts(rng, self._tokens("!", keys, ":", values, "!"))

        asked = rng.permuted(np.tile(np.arange(level), (size, 1)), axis=1)[:, : min(queries, level), None]
        query = self._tokens("?!", np.take_along_axis(keys, asked, 1), ":")
        value = np.take_along_axis(values, asked, 1)
        ids = self._tokens(query, value, END)
        start, stop = query.shape[-1], query.shape[-1] + cfg.value_length
        labels, mask = ids.copy(), np.zeros(ids.shape, bool)
        labels[..., :start] = IGNORE
        mask[..., start:stop] = True
        return Batch(torch.from_numpy(contexts), torch.full((size,), contexts.shape[1]), torch.from_numpy(ids),
                     torch.from_numpy(labels), torch.from_numpy(mask))

    def _digits(self, numbers: np.ndarray, length: int) -> np.ndarray:
        """The numbers in base ``alphabet_size``, one digit per entry of a new last dimension."""
        return numbers[..., None] // self.config.alphabet_size ** np.arange(length) % self.config.alphabet_size

    def _tokens(self, *parts: str | np.ndarray) -> np.ndarray:
        """Concatenates token ids ``[B, n, *]`` and literal text along the last dimension."""
        lead = next(part.shape[:-1] for part in parts if isinstance(part, np.ndarray))
        arrays = [np.broadcast_to(self.tokenizer.encode(part), (*lead, len(part))) if isinstance(part, str) else part
                  for part in parts]
        return np.concatenate(arrays, -1)

    def _contexts(self, rng: np.random.Generator, pairs: np.ndarray) -> np.ndarray:
        """Pairs ``[B, n, w]`` and filler in random order, cut into segments: token ids ``[B, S]``."""
        cfg, (size, n, width) = self.config, pairs.shape
        items = n + cfg.filler
        ends = min(cfg.segments, items)  # a curriculum may have fewer pairs than there are segments
        rank = np.concatenate([rng.permuted(np.tile(np.arange(items, dtype=float), (size, 1)), axis=1),
                               np.tile(np.arange(1, ends + 1) * items / ends - 0.5, (size, 1))], 1)
        widths = np.array([width] * n + [1] * (cfg.filler + ends))
        order = rank.argsort(1, kind="stable")
        offsets = np.empty((size, len(widths)), int)
        np.put_along_axis(offsets, order, widths[order].cumsum(1) - widths[order], 1)

        out = np.empty((size, widths.sum()), np.int64)
        rows = np.arange(size)[:, None]
        out[rows[:, :, None], offsets[:, :n, None] + np.arange(width)] = pairs
        out[rows, offsets[:, n:items]] = rng.integers(0, cfg.alphabet_size, (size, cfg.filler)) + 1 + len(SYNTAX)
        out[rows, offsets[:, items:]] = self.tokenizer.encode("|")
        return out


def _distinct(rng: np.random.Generator, rows: int, count: int, n: int) -> np.ndarray:
    """``count`` different numbers below ``n`` in each row."""
    if n <= max(1024, count * count):
        return rng.permuted(np.tile(np.arange(n), (rows, 1)), axis=1)[:, :count]
    out = rng.integers(0, n, (rows, count))
    while True:  # each row is free of duplicates with a probability above one half
        ordered = np.sort(out, 1)
        again = (ordered[:, 1:] == ordered[:, :-1]).any(1)
        if not again.any():
            return out
        out[again] = rng.integers(0, n, (int(again.sum()), count))
