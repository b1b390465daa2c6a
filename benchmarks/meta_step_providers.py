"""Who computes a meta-step, and on which model and data; first-order training of the same model, as a yardstick."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peer
from benchmarks.eager import EagerDecoder, eager_write, sdpa, token_loss
from benchmarks.harness import Result
from benchmarks.rows import PAPER_CODE
from benchmarks.shapes import Shape
from gradmem_kernels import Decoder, Prefix, PrefixLoss, linear_cross_entropy, write

__all__ = ["EAGER", "FIRST_ORDER", "GRAPHS", "INNER_LR", "PEER", "PROVIDERS", "Model", "Provider", "Step", "captured",
           "make_model", "make_step"]

Step = Callable[[], Result]
Weights = dict[str, Tensor]
T = TypeVar("T")

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
#: The paper's own code, from a checkout of its repository.
PEER = Provider(PAPER_CODE, "create_graph")
#: The library's step replayed as a CUDA graph.
GRAPHS = tuple(Provider("gradmem-graph", mode) for mode in ("none", "step"))
#: Ordinary training on the tokens that an inner step reads: gradients of their mean loss.
FIRST_ORDER = (Provider("gradmem", "first-order"), Provider("sdpa", "first-order"))


class Model(NamedTuple):
    """What a provider computes with: weights and data are the same for all."""

    provider: Provider
    decoder: torch.nn.Module
    weights: Weights
    head: Tensor
    context: Tensor
    query: Tensor


def make_model(provider: Provider, shape: Shape, dtype: torch.dtype = torch.float32, *, device: str = "cpu",
               trained: bool = True, rounded: torch.dtype = torch.float64) -> Model:
    """The arguments are those of :func:`make_step`."""
    with torch.device(device):
        generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
        context, query = (torch.randint(shape.vocabulary, (shape.batch, length), generator=generator)
                          for length in (shape.context_tokens, shape.query_tokens))
        decoder, weights = _modules(provider, shape, dtype)
        for name, weight in sorted(weights.items()):
            wide = torch.promote_types(dtype, torch.float32) if name == "memory" else dtype
            weight.data = _draw(weight.shape, generator).to(rounded).to(wide)
            weight.requires_grad_(trained or name == "memory")
    return Model(provider, decoder, weights, weights["embedding" if shape.tied else "head"], context, query)


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
    model = make_model(provider, shape, dtype, device=device, trained=trained, rounded=rounded)
    wanted = {name: weight for name, weight in model.weights.items() if weight.requires_grad}
    compute = partial(_compute(provider, shape.steps), *model[1:])

    def step() -> Result:
        loss = compute()
        return loss.detach(), dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))

    return captured(step, device) if provider in GRAPHS else step


def _modules(provider: Provider, shape: Shape, dtype: torch.dtype) -> tuple[torch.nn.Module, Weights]:
    """A decoder, and all weights by Llama's names and ``embedding``, ``head`` and ``memory``."""
    if provider == PEER:
        return peer.load(shape, dtype, INNER_LR)
    library = provider.name not in (EAGER.name, "sdpa")
    decoder = Decoder(shape.config(), dtype=dtype) if library else _eager_decoder(shape, provider, dtype)
    rows = {"embedding": shape.vocabulary, "head": shape.vocabulary, "memory": shape.memory_tokens}
    weights: Weights = {name: torch.nn.Parameter(torch.empty(n, shape.width)) for name, n in rows.items()}
    if shape.tied:
        del weights["head"]
    return decoder, weights | dict(decoder.named_parameters())


def _compute(provider: Provider, steps: int) -> Callable[..., Tensor]:
    """``(decoder, weights, head, context, query) -> loss``."""
    if provider == EAGER:
        return partial(_eager_loss, steps=steps)
    if provider == PEER:
        return _peer_loss
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


def _peer_loss(model: torch.nn.Module, weights: Weights, head: Tensor, context: Tensor, query: Tensor) -> Tensor:
    return model({"context_input_ids": context, "query_input_ids": query}, labels=query)["loss"]


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


def captured(step: Callable[[], T], device: str) -> Callable[[], T]:
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
