"""Greedy decoding from a memory's prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from gradmem.lm import Backbone

__all__ = ["greedy"]


@torch.no_grad()
def greedy(backbone: Backbone, prefix: Tensor, query_ids: Tensor, lengths: Tensor, max_new_tokens: int,
           eos_token_id: int | None) -> Tensor:
    """The most likely continuation, token by token, of each right-padded query behind its prefix.

    The prefix goes through the decoder once; its keys and values are repeated for the ``n`` queries.

    Args:
        backbone: embeds, decodes and predicts.
        prefix: ``[N, P, D]``.
        query_ids: ``[N, n, T]`` int64.
        lengths: ``[N * n]`` valid tokens of each query; behind an empty one the prefix's last row predicts.
        max_new_tokens: tokens to generate.
        eos_token_id: ends a continuation, which is then filled up with it.

    Returns:
        ``[N * n, max_new_tokens]`` int64.
    """
    decoder, queries = backbone.decoder, query_ids.flatten(0, 1)
    size, length = prefix.shape[:2]
    cache = decoder.new_cache(size, length)
    hidden = decoder.prefill(prefix, cache)[:, -1:].repeat_interleave(query_ids.shape[1], 0)
    cache = cache.repeat(query_ids.shape[1], length + query_ids.shape[2] + max_new_tokens - 1)
    if query_ids.shape[2]:
        hidden = torch.cat([hidden, decoder.prefill(backbone.embed_tokens(queries), cache)], 1)
        cache.truncate(length + lengths)
    hidden = hidden[torch.arange(len(hidden), device=hidden.device), lengths.long()]  # of the last valid token

    tokens: list[Tensor] = []
    done = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    while True:
        token = F.linear(hidden, backbone.head_weight).argmax(-1)
        if eos_token_id is not None:
            token = token.masked_fill(done, eos_token_id)
            done |= token == eos_token_id
        tokens.append(token)
        if len(tokens) == max_new_tokens or done.all():
            break
        hidden = decoder.step(backbone.embed_tokens(token).unsqueeze(1), cache).squeeze(1)
    out = torch.stack(tokens, 1)
    if out.shape[1] < max_new_tokens:
        out = F.pad(out, (0, max_new_tokens - out.shape[1]), value=eos_token_id)
    return out
