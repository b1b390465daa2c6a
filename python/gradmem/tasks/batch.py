"""What a task gives to training and evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IGNORE", "Batch", "exact_match", "token_accuracy"]

IGNORE = -100  # label of a position without one


@dataclass(frozen=True, eq=False)
class Batch:
    """``B`` contexts with ``n`` queries each, right-padded.

    Attributes:
        context_ids: ``[B, S]`` int64.
        context_lengths: ``[B]`` int64.
        query_ids: ``[B, n, T]`` int64, each query followed by its target.
        labels: ``[B, n, T]`` int64, the target's tokens where they stand in ``query_ids``, elsewhere -100.
        value_mask: ``[B, n, T]`` bool, the target's tokens that exact match counts.
    """

    context_ids: Tensor
    context_lengths: Tensor
    query_ids: Tensor
    labels: Tensor
    value_mask: Tensor

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        """One batch of batches of the same lengths."""
        return Batch(*(torch.cat([getattr(batch, field.name) for batch in batches])
                       for field in dataclasses.fields(Batch)))

    def part(self, rank: int, world: int) -> Batch:
        """The contexts of process ``rank`` of ``world``: consecutive ones, numbers that differ by one at most."""
        return Batch(*(getattr(self, field.name).tensor_split(world)[rank] for field in dataclasses.fields(self)))

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


def exact_match(logits: Tensor, batch: Batch) -> Tensor:
    """``[B, n]`` bool: whether every value token is the most likely one.

    With the target given as input this is true exactly where greedy decoding would produce the value.

    Args:
        logits: ``[B, n, T, V]``, aligned with ``batch.query_ids``.
        batch: where the labels and the value mask are.
    """
    return ((logits.argmax(-1) == batch.labels) | ~batch.value_mask).all(-1)


def token_accuracy(logits: Tensor, batch: Batch) -> Tensor:
    """``[B, n]``: the fraction of the value tokens that are the most likely ones, given the true tokens before them.

    Args:
        logits: ``[B, n, T, V]``, aligned with ``batch.query_ids``.
        batch: where the labels and the value mask are.
    """
    right = (logits.argmax(-1) == batch.labels) & batch.value_mask
    return right.sum(-1) / batch.value_mask.sum(-1)
