"""Sizes of the models and data that whole steps are measured on, and what a step must spend."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gradmem_kernels import DecoderConfig

__all__ = ["BYTE_FORMULA", "FLOP_FORMULA", "LLAMA_1B", "LLAMA_CHECKED", "PAPER", "QUICK", "Shape"]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the data. ``tied``: the head is the embedding table."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    intermediate: int
    vocabulary: int
    batch: int
    context_tokens: int
    memory_tokens: int
    query_tokens: int
    steps: int
    tied: int = 0

    def flops(self) -> float:
        """Floating-point operations of the meta-step after :data:`FLOP_FORMULA`."""
        return self.steps * 6 * self.forward(self.context_tokens) + 3 * self.forward(self.query_tokens)

    def forward(self, tokens: int) -> float:
        """Operations of a forward pass over the memory and ``tokens`` tokens, causal attention counted half."""
        rows = self.memory_tokens + tokens - 1
        attention = self.layers * 2 * rows * self.width / 2
        head = tokens * self.width * self.vocabulary
        return 2 * self.batch * (rows * (self.layers * self._layer() + attention) + head)

    def weights(self) -> int:
        """Elements of all matrices."""
        return self.layers * self._layer() + (1 if self.tied else 2) * self.vocabulary * self.width

    def weight_bytes(self, dtype: torch.dtype) -> float:
        """What the meta-step must move at least, after :data:`BYTE_FORMULA`."""
        return float((4 * self.steps + 3) * self.weights() * dtype.itemsize)

    def _layer(self) -> int:
        key = self.width * self.kv_heads // self.heads
        return self.width * (2 * self.width + 2 * key + 3 * self.intermediate)

    def config(self) -> DecoderConfig:
        return DecoderConfig(hidden_size=self.width, num_layers=self.layers, num_heads=self.heads,
                             num_kv_heads=self.kv_heads, intermediate_size=self.intermediate)


FLOP_FORMULA = "K * 6 F(context) + 3 F(query), F: matrix products of a forward pass, causal attention counted half"
BYTE_FORMULA = ("(4 K + 3) W, W: bytes of all matrices, read once by each pass of WRITE, of its outer backward and of "
                "READ, and written once as gradients")

#: The paper's key-value retrieval model (arXiv 2603.13875) and a batch of its data.
PAPER = Shape(layers=4, heads=4, kv_heads=4, width=128, intermediate=512, vocabulary=72, batch=64, context_tokens=112,
              memory_tokens=8, query_tokens=8, steps=2)
QUICK = Shape(layers=2, heads=2, kv_heads=1, width=16, intermediate=24, vocabulary=11, batch=3, context_tokens=9,
              memory_tokens=2, query_tokens=3, steps=2)
#: The shape of Llama-3.2-1B.
LLAMA_1B = Shape(layers=16, heads=32, kv_heads=8, width=2048, intermediate=8192, vocabulary=128256, batch=1,
                 context_tokens=4096, memory_tokens=32, query_tokens=32, steps=2, tied=1)
#: Its width, small enough for float64 and plain PyTorch.
LLAMA_CHECKED = replace(LLAMA_1B, layers=2, vocabulary=4096, context_tokens=256)
