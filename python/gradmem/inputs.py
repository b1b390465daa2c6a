"""Checks of token ids, lengths and labels, before any work is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmem.tasks.batch import IGNORE
from gradmem_kernels.checks import Checker, check_values

__all__ = ["check_contexts", "check_count", "check_ids", "check_labels", "check_lengths", "check_queries"]


def check_ids(check: Checker, argument: str, value: Any, dims: tuple[str, ...], vocab_size: int, *,
              empty: bool = False) -> None:
    """Token ids: int64, in ``0..vocab_size - 1``; the last dimension may be 0 where ``empty``."""
    check.tensor(argument, value, dims, dtypes=(torch.int64,))
    if value.shape[-1] == 0 and not empty:
        check.fail(argument, "at least one token", f"shape {list(value.shape)}")
    if value.numel() and check_values(value):
        low, high = value.min().item(), value.max().item()
        if low < 0 or high >= vocab_size:
            check.fail(argument, f"token ids in 0..{vocab_size - 1}", low if low < 0 else high)


def check_lengths(check: Checker, argument: str, value: Any, dims: tuple[str, ...], longest: int,
                  shortest: int = 1) -> None:
    """Lengths of right-padded rows: int64 or int32, in ``shortest..longest``."""
    check.tensor(argument, value, dims, dtypes=(torch.int64, torch.int32))
    if value.numel() and check_values(value):
        low, high = value.min().item(), value.max().item()
        if low < shortest or high > longest:
            check.fail(argument, f"lengths in {shortest}..{longest}", low if low < shortest else high)


def check_contexts(check: Checker, argument: str, ids: Any, lengths: Any, vocab_size: int) -> None:
    """Contexts: ids ``[B, S]``, right-padded to ``context_lengths [B]``, where these are given."""
    check_ids(check, argument, ids, ("B", "S"), vocab_size)
    if lengths is not None:
        check_lengths(check, "context_lengths", lengths, ("B",), ids.shape[1])


def check_queries(check: Checker, argument: str, ids: Any, vocab_size: int, *, empty: bool = False) -> None:
    """Queries: ids ``[B, T]``, or ``[B, n, T]`` for several of each context."""
    several = isinstance(ids, Tensor) and ids.ndim == 3
    check_ids(check, argument, ids, ("B", "n", "T") if several else ("B", "T"), vocab_size, empty=empty)


def check_labels(check: Checker, value: Any, query_ids: Tensor, vocab_size: int) -> None:
    """Labels: int64, of the query's shape, token ids or -100."""
    check.tensor("labels", value, ("...",), dtypes=(torch.int64,))
    check.same_shape("labels", value, "query_input_ids", query_ids)
    if value.numel() and check_values(value):
        wrong = value[((value < 0) | (value >= vocab_size)) & (value != IGNORE)]
        if len(wrong):
            check.fail("labels", f"token ids in 0..{vocab_size - 1}, or {IGNORE} for none", wrong[0].item())


def check_count(check: Checker, argument: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        check.fail(argument, f"an integer >= {minimum}", value)
