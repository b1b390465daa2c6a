"""Rows behind right-padded contexts."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["join"]


def join(context: Tensor, lengths: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[valid context; rows; padding]``, and the positions ``[B, R]`` where ``rows`` stand in it.

    Nothing looks at values on the host, so that it can be captured into a CUDA graph.

    Args:
        context: ``[B, S, ...]``, right-padded: input embeddings or token ids.
        lengths: ``[B]`` valid entries of each context; default: all.
        rows: ``[B, R, ...]``.
    """
    joined, size, count = torch.cat([context, rows], 1), context.shape[1], rows.shape[1]
    own = torch.arange(count, device=context.device)
    if lengths is None:
        return joined, (size + own).expand(len(context), -1)
    ends, at = lengths.unsqueeze(1), torch.arange(size + count, device=context.device)
    # behind the end come the rows, behind these what the context was padded with
    source = torch.where(at < ends, at, torch.where(at < ends + count, at - ends + size, at - count))
    source = source.view(*source.shape, *[1] * (joined.ndim - 2)).expand_as(joined)
    return joined.gather(1, source), ends + own
