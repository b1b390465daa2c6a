"""The small built-in backbone: a decoder of the Llama family with its embedding table and head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradmem.config import LMConfig
from gradmem_kernels import Decoder, DecoderConfig

__all__ = ["CausalLM"]


class CausalLM(nn.Module):
    """Embedding table, :class:`gradmem_kernels.Decoder` and head.

    :class:`gradmem.GradMem` asks a backbone for ``config`` (with ``to_dict()``), ``embed_tokens`` (an ``nn.Embedding``
    ``[V, D]``), ``decoder`` and ``head_weight`` ``[V, D]``.

    Matrices start normal with standard deviation ``fan_in ** -0.5`` (those that write into the residual stream with
    half of it), which lets models of small width learn quickly; the embedding table and the head with 0.02.
    """

    def __init__(self, config: LMConfig, *, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.decoder = Decoder(DecoderConfig(
            hidden_size=config.hidden_size, num_layers=config.num_layers, num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads, intermediate_size=config.intermediate_size,
            norm_eps=config.norm_eps, rope_theta=config.rope_theta), device=device, dtype=dtype)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
            nn.init.normal_(self.lm_head.weight, std=0.02)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for name, weight in self.decoder.named_parameters():
            if weight.ndim == 2:
                to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * (0.5 if to_residual else 1.0))

    @property
    def head_weight(self) -> Tensor:
        """``[V, D]``."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight
