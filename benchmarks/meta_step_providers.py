"""Who computes a meta-step, and on which model and data; first-order training of the same model, as a yardstick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.eager import EagerDecoder, eager_write, sdpa, token_loss
from benchmarks.harness import Result
from gradmem_kernels import Decoder, DecoderConfig, Prefix, PrefixLoss, linear_cross_entropy, write

__all__ = ["EAGER", "FIRST_ORDER", "FLOP_FORMULA", "GRAPHS", "LLAMA_1B", "PAPER", "PROVIDERS", "QUICK", "Provider",
           "Shape", "Step", "make_step"]

Step = Callable[[], Result]
Weights = dict[str, Tensor]

#: Large enough for the second-order terms to be a visible part of every gradient.
INNER_LR = 1.0


class Provider(NamedTuple):
    """Who computes the step, and how: eager PyTorch, or the library with a ``recompute`` mode."""

    name: str
    mode: str

    def __str__(self) -> str:
        return f"{self.name} {self.mode}"


EAGER = Provider("eager", "create_graph")
PROVIDERS = (EAGER, *(Provider("gradmem", mode) for mode in ("none", "step", "layer")))
#: The library's step replayed as a CUDA graph.
GRAPHS = tuple(Provider("gradmem-graph", mode) for mode in ("none", "step"))
#: Ordinary training on the tokens that an inner step reads: gradients of their mean loss.
FIRST_ORDER = (Provider("gradmem", "first-order"), Provider("sdpa", "first-order"))


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
        return self.steps * 6 * self._forward(self.context_tokens) + 3 * self._forward(self.query_tokens)

    def _forward(self, tokens: int) -> float:
        rows = self.memory_tokens + tokens - 1
        key = self.width * self.kv_heads // self.heads
        weights = self.layers * self.width * (2 * self.width + 2 * key + 3 * self.intermediate)
        attention = self.layers * 2 * rows * self.width / 2
        return 2 * self.batch * (rows * (weights + attention) + tokens * self.width * self.vocabulary)

    def config(self) -> DecoderConfig:
        return DecoderConfig(hidden_size=self.width, num_layers=self.layers, num_heads=self.heads,
                             num_kv_heads=self.kv_heads, intermediate_size=self.intermediate)


FLOP_FORMULA = "K * 6 F(context) + 3 F(query), F: matrix products of a forward pass, causal attention counted half"

#: The paper's key-value retrieval model (arXiv 2603.13875) and a batch of its data.
PAPER = Shape(layers=4, heads=4, kv_heads=4, width=128, intermediate=512, vocabulary=72, batch=64, context_tokens=112,
              memory_tokens=8, query_tokens=8, steps=2)
QUICK = Shape(layers=2, heads=2, kv_heads=1, width=16, intermediate=24, vocabulary=11, batch=3, context_tokens=9,
              memory_tokens=2, query_tokens=3, steps=2)
#: The shape of Llama-3.2-1B.
LLAMA_1B = Shape(layers=16, heads=32, kv_heads=8, width=2048, intermediate=8192, vocabulary=128256, batch=1,
                 context_tokens=4096, memory_tokens=32, query_tokens=32, steps=2, tied=1)


def make_step(provider: Provider, shape: Shape, dtype: torch.dtype = torch.float32, *, device: str = "cpu",
              trained: bool = True, rounded: torch.dtype = torch.float64) -> Step:
    """The step of one provider: loss, and its gradients in every weight, the embeddings and the first memory.

    Weights and data are drawn from one seed in float64 and ``rounded``, so they are the same for every provider and
    dtype. A memory is at least float32. On the meta device nothing has a value.

    Args:
        provider: one of the above.
        shape: of model and data.
        dtype: of all but the memory.
        device: where it runs.
        trained: whether gradients go to anything but the memory.
        rounded: what the values are rounded to first.
    """
    library = provider.name != EAGER.name and provider.name != "sdpa"
    with torch.device(device):
        generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
        context, query = (torch.randint(shape.vocabulary, (shape.batch, length), generator=generator)
                          for length in (shape.context_tokens, shape.query_tokens))
        decoder = Decoder(shape.config(), dtype=dtype) if library else _eager_decoder(shape, provider, dtype)
        rows = {"embedding": shape.vocabulary, "head": shape.vocabulary, "memory": shape.memory_tokens}
        weights: Weights = {name: torch.nn.Parameter(torch.empty(n, shape.width)) for name, n in rows.items()}
        if shape.tied:
            del weights["head"]
        weights |= dict(decoder.named_parameters())
        for name, weight in sorted(weights.items()):
            wide = torch.promote_types(dtype, torch.float32) if name == "memory" else dtype
            weight.data = _draw(weight.shape, generator).to(rounded).to(wide)
            weight.requires_grad_(trained or name == "memory")
    wanted = {name: weight for name, weight in weights.items() if weight.requires_grad}
    head = weights["embedding" if shape.tied else "head"]
    compute = partial(_compute(provider, shape.steps), decoder, weights, head, context, query)

    def step() -> Result:
        loss = compute()
        return loss.detach(), dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))

    return _captured(step, device) if provider in GRAPHS else step


def _compute(provider: Provider, steps: int) -> Callable[..., Tensor]:
    """``(decoder, weights, head, context, query) -> loss``."""
    if provider == EAGER:
        return partial(_eager_loss, steps=steps)
    if provider.mode == "first-order":
        return partial(_first_order_loss, library=provider.name != "sdpa")
    return partial(_library_loss, steps=steps, recompute=provider.mode)


def _eager_decoder(shape: Shape, provider: Provider, dtype: torch.dtype) -> EagerDecoder:
    attend = {} if provider == EAGER else {"attend": sdpa}
    return EagerDecoder(width=shape.width, layers=shape.layers, heads=shape.heads, kv_heads=shape.kv_heads,
                        intermediate=shape.intermediate, **attend).to(dtype)


def _eager_loss(decoder: EagerDecoder, weights: Weights, head: Tensor, context: Tensor, query: Tensor, *,
                steps: int) -> Tensor:
    memory = weights["memory"].expand(len(context), -1, -1)
    memory = eager_write(decoder, memory, F.embedding(context, weights["embedding"]), context, head, steps=steps,
                         lr=INNER_LR)
    return token_loss(decoder, memory, F.embedding(query, weights["embedding"]), query, head).mean()


def _library_loss(decoder: Decoder, weights: Weights, head: Tensor, context: Tensor, query: Tensor, *, steps: int,
                  recompute: str) -> Tensor:
    prefix = Prefix(weights["memory"].shape[-1])
    memory = weights["memory"].expand(len(context), -1, -1)
    write_loss, read_loss = (PrefixLoss(decoder, prefix, F.embedding(ids, weights["embedding"]), ids, head)
                             for ids in (context, query))
    memory = write(write_loss, memory, steps=steps, lr=INNER_LR, recompute=recompute).memory
    return read_loss(memory).mean()


def _first_order_loss(decoder: Decoder | EagerDecoder, weights: Weights, head: Tensor, context: Tensor, query: Tensor,
                      *, library: bool) -> Tensor:
    """The loss of the context behind the memory, as WRITE reads it; the head's gradient in the same sweep as the loss.

    That is the library's op for both decoders: PyTorch has none that holds no logits in the versions that are allowed.
    """
    tokens = F.embedding(context, weights["embedding"])
    memory = weights["memory"].expand(len(context), -1, -1).to(tokens.dtype)
    rows, first = torch.cat([memory, tokens[:, :-1]], 1), memory.shape[1] - 1
    hidden = decoder(rows, start=first) if library else decoder(rows, first)
    ones = torch.ones(len(context), device=context.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return linear_cross_entropy(hidden, head, context, loss_bar=ones).mean()


def _captured(step: Step, device: str) -> Step:
    """The step as a CUDA graph; it returns the same tensors in every call."""
    from gradmem.graphs import CudaCapture  # not in the resident set of those that need none

    capture = CudaCapture(torch.device(device))
    for _ in range(2):
        capture.warm_up(step)
    return capture.record(step)


def _draw(size: torch.Size, generator: torch.Generator | None) -> Tensor:
    """Matrices with rows of norm about 1, vectors (of the norms) about 1: activations neither vanish nor grow."""
    normal = torch.randn(size, generator=generator, dtype=torch.float64)
    return normal * size[-1] ** -0.5 if len(size) > 1 else 1 + 0.1 * normal
