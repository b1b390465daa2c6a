"""Exact match on held-out contexts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gradmem.baselines import Model
from gradmem.tasks import FileTask, KVTask, exact_match, token_accuracy
from gradmem.tasks.batch import IGNORE

__all__ = ["Evaluation", "evaluate"]


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
    """Writes and reads held-out contexts of ``task``, with ``steps`` inner steps (default: as trained)."""
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
