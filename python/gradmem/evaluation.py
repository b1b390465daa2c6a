"""Exact match on held-out contexts: of tokens, and of generated text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gradmem.baselines import Model
from gradmem.tasks import FileTask, KVTask, exact_match, token_accuracy
from gradmem.tasks.batch import IGNORE
from gradmem.tasks.scores import squad_exact_match, squad_f1, text_exact_match
from gradmem_kernels.checks import Checker

__all__ = ["Evaluation", "TextScores", "evaluate", "score_text"]


@dataclass(frozen=True)
class Evaluation:
    """Results over ``samples`` queries.

    Attributes:
        samples: queries.
        loss: mean per label, in nats.
        exact_match: fraction of the queries whose value tokens are all the most likely ones: those that greedy decoding
            answers exactly.
        token_accuracy: mean over the queries of the fraction of value tokens that are the most likely ones, given the
            true tokens before them.
    """

    samples: int
    loss: float
    exact_match: float
    token_accuracy: float


@torch.no_grad()
def evaluate(model: Model, task: KVTask | FileTask, samples: int, *, steps: int | None = None,
             batch_size: int = 256) -> Evaluation:
    """Writes and reads held-out contexts of ``task``.

    Args:
        model: writes and reads; a baseline too.
        task: has the contexts and their queries.
        samples: the first so many contexts.
        steps: inner steps, >= 0; default: as trained.
        batch_size: contexts written at once.
    """
    device = next(model.parameters()).device
    queries, labels, loss, matches, tokens = 0, 0, 0.0, 0.0, 0.0
    for cpu_batch in task.held_out(samples, batch_size):
        batch = cpu_batch.to(device)
        memory = model.write(batch.context_ids, context_lengths=batch.context_lengths, steps=steps)
        logits = model.read(memory, batch.query_ids)  # type: ignore[arg-type] # each reads what it wrote
        loss += F.cross_entropy(logits.float().flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORE,
                                reduction="sum").item()
        labels += int((batch.labels != IGNORE).sum())
        matches += exact_match(logits, batch).sum().item()
        tokens += token_accuracy(logits, batch).sum().item()
        queries += batch.labels[..., 0].numel()
    return Evaluation(queries, loss / labels, matches / queries, tokens / queries)


@dataclass(frozen=True)
class TextScores:
    """Scores of generated answers, means over ``samples`` queries; each takes the best of a query's right answers.

    Attributes:
        samples: queries.
        exact_match: the same text, white space at the ends aside.
        squad_exact_match, squad_f1: those of SQuAD, see :mod:`gradmem.tasks.scores`.
    """

    samples: int
    exact_match: float
    squad_exact_match: float
    squad_f1: float


@torch.no_grad()
def score_text(model: Model, task: FileTask, samples: int, *, steps: int | None = None, batch_size: int = 32,
               max_new_tokens: int | None = None) -> TextScores:
    """Writes held-out contexts of ``task``, generates the answers to their queries greedily and scores their text.

    Args:
        model: as for :func:`evaluate`.
        task: of files whose rows have answers: bAbI, SQuAD, JSON lines.
        samples: the first so many examples.
        steps: inner steps, >= 0; default: as trained.
        batch_size: contexts written at once.
        max_new_tokens: generated for an answer at most; default: enough for the longest right answer.

    Raises:
        ArgumentError: for a task whose answers are not known as text.
    """
    if not isinstance(task, FileTask):
        Checker("score_text").fail("task", "a FileTask", type(task).__name__,
                                   "evaluate tells the exact match of generated pairs")
    device = next(model.parameters()).device
    found = []
    for contexts, context_lengths, queries, query_lengths, answers in task.questions(samples, batch_size):
        memory = model.write(contexts.to(device), context_lengths=context_lengths.to(device), steps=steps)
        ids = model.generate(memory, queries.to(device),  # type: ignore[arg-type] # each reads what it wrote
                             query_lengths=query_lengths.to(device), eos_token_id=task.tokenizer.end_id,
                             max_new_tokens=task.longest_answer if max_new_tokens is None else max_new_tokens)
        for row, gold in zip(ids.tolist(), answers, strict=True):
            text = task.tokenizer.answer(row)
            found.append([score(text, gold) for score in (text_exact_match, squad_exact_match, squad_f1)])
    return TextScores(len(found), *torch.tensor(found, dtype=torch.float64).mean(0).tolist())
