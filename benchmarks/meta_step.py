"""One meta-step: WRITE a context into a memory, READ a query from it, differentiate the READ loss through the WRITE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from benchmarks.eager import EagerDecoder, eager_write, token_loss
from benchmarks.harness import (
    Options,
    Report,
    Result,
    Row,
    Samples,
    gate,
    in_fresh_process,
    interleave,
    measure_process,
    mebibytes,
    quantiles,
    relative_errors,
)
from benchmarks.live_memory import peak_live_bytes
from gradmem_kernels import Decoder, DecoderConfig, Prefix, PrefixLoss, write

__all__ = ["EAGER", "PAPER", "PROVIDERS", "QUICK", "Provider", "Shape", "admit", "make_step", "run", "table"]

Step = Callable[[], Result]
Weights = dict[str, Tensor]

#: Large enough for the second-order terms to be a visible part of every gradient.
INNER_LR = 1.0


class Provider(NamedTuple):
    """Who computes the meta-step, and how: eager PyTorch, or the library with a ``recompute`` mode."""

    name: str
    mode: str

    def __str__(self) -> str:
        return f"{self.name} {self.mode}"


EAGER = Provider("eager", "create_graph")
PROVIDERS = (EAGER, *(Provider("gradmem", mode) for mode in ("none", "step", "layer")))


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the data."""

    layers: int
    heads: int
    width: int
    intermediate: int
    vocabulary: int
    batch: int
    context_tokens: int
    memory_tokens: int
    query_tokens: int
    steps: int

    def flops(self) -> float:
        """Floating-point operations of the meta-step after :data:`FLOP_FORMULA`."""
        return self.steps * 6 * self._forward(self.context_tokens) + 3 * self._forward(self.query_tokens)

    def _forward(self, tokens: int) -> float:
        rows = self.memory_tokens + tokens - 1
        weights = self.layers * (4 * self.width**2 + 3 * self.width * self.intermediate)
        attention = self.layers * 2 * rows * self.width / 2
        return 2 * self.batch * (rows * (weights + attention) + tokens * self.width * self.vocabulary)


FLOP_FORMULA = "K * 6 F(context) + 3 F(query), F: matrix products of a forward pass, causal attention counted half"

#: The paper's key-value retrieval model (arXiv 2603.13875) and a batch of its data.
PAPER = Shape(layers=4, heads=4, width=128, intermediate=512, vocabulary=72, batch=64, context_tokens=112,
              memory_tokens=8, query_tokens=8, steps=2)
QUICK = Shape(layers=2, heads=2, width=16, intermediate=24, vocabulary=11, batch=3, context_tokens=9,
              memory_tokens=2, query_tokens=3, steps=2)


def make_step(provider: Provider, shape: Shape, dtype: torch.dtype = torch.float32) -> Step:
    """The meta-step of one provider: loss, and its gradients in every weight, the embeddings and the first memory.

    Weights and data are drawn from one seed in float64, so they are the same for every provider and dtype.
    """
    generator = torch.Generator().manual_seed(0)
    context, query = (torch.randint(shape.vocabulary, (shape.batch, length), generator=generator)
                      for length in (shape.context_tokens, shape.query_tokens))
    decoder = _eager_decoder(shape) if provider == EAGER else _library_decoder(shape)
    rows = {"embedding": shape.vocabulary, "head": shape.vocabulary, "memory": shape.memory_tokens}
    weights: Weights = {name: torch.nn.Parameter(torch.empty(n, shape.width)) for name, n in rows.items()}
    weights |= dict(decoder.named_parameters())
    for _, weight in sorted(weights.items()):
        weight.data = _draw(weight.shape, generator).to(dtype)
    compute = _eager_loss if provider == EAGER else partial(_library_loss, recompute=provider.mode)

    def step() -> Result:
        loss = compute(decoder, weights, context, query, shape.steps)
        return loss.detach(), dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    return step


def admit(providers: Sequence[Provider], shape: Shape, dtype: torch.dtype = torch.float32,
          ) -> tuple[dict[Provider, tuple[float, float]], list[str]]:
    """The providers that compute this shape as exactly as plain PyTorch does, with their largest relative error
    against float64 and plain PyTorch's, and why the others are refused."""
    exact = make_step(EAGER, shape, torch.float64)()
    eager = relative_errors(make_step(EAGER, shape, dtype)(), exact)
    admitted, refused = {}, []
    for provider in providers:
        errors = eager if provider == EAGER else relative_errors(make_step(provider, shape, dtype)(), exact)
        reason = gate(str(provider), errors, eager)
        if reason is None:
            admitted[provider] = max(errors.values()), max(eager.values())
        else:
            refused.append(reason)
    return admitted, refused


def run(options: Options) -> Report:
    """Time, page faults and peak memory of every provider, interleaved."""
    shape = QUICK if options.quick else PAPER
    admitted, refused = admit(PROVIDERS, shape)
    steps = {provider: make_step(provider, shape) for provider in admitted}
    samples = interleave(steps, options)
    rows = [_row(provider, shape, samples, peak_live_bytes(steps[provider]), errors)
            for provider, errors in admitted.items()]
    return Report(rows, refused)


def table(rows: Sequence[Row]) -> Table:
    """The rows as people read them."""
    shape = ", ".join(f"{name} {size}" for name, size in rows[0].shape.items())
    out = Table(title=f"meta-step, {rows[0].dtype}; {shape}", caption=f"GFLOP: {FLOP_FORMULA}")
    for column in ("provider", "mode", "ms", "20 %", "80 %", "of eager", "GFLOP/s", "live MiB", "of eager", "RSS MiB",
                   "faults", "error"):
        out.add_column(column, justify="left" if column in ("provider", "mode") else "right", no_wrap=True)
    eager = next(row.peak_live_bytes for row in rows if row.provider == EAGER.name)
    for row in rows:
        out.add_row(row.provider, row.mode, *(f"{ms:.1f}" for ms in (row.median_ms, row.q20_ms, row.q80_ms)),
                    _ratio(row.ratio_to_eager), f"{1e3 * row.tflops:.1f}", mebibytes(row.peak_live_bytes),
                    _ratio(row.peak_live_bytes / eager), mebibytes(row.peak_rss_bytes), f"{row.minor_faults:.0f}",
                    f"{row.error:.0e}")
    return out


def _row(provider: Provider, shape: Shape, samples: dict[Provider, Samples], peak: int,
         errors: tuple[float, float]) -> Row:
    seconds = samples[provider].seconds
    q20, median, q80 = (1e3 * t for t in quantiles(seconds))
    ratios = [ours / eager for ours, eager in zip(seconds, samples[EAGER].seconds, strict=True)]
    process = in_fresh_process(measure_process, make_step, (provider, shape), torch.get_num_threads())
    return Row(
        suite="meta-step", step="meta-step", provider=provider.name, mode=provider.mode, dtype="float32",
        shape=asdict(shape), median_ms=median, q20_ms=q20, q80_ms=q80, repeats=len(seconds),
        ratio_to_eager=quantiles(ratios)[1], tflops=shape.flops() / median * 1e-9, flop_formula=FLOP_FORMULA,
        peak_live_bytes=peak, peak_rss_bytes=process.peak_rss_bytes, minor_faults=process.minor_faults,
        error=errors[0], eager_error=errors[1])


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _eager_decoder(shape: Shape) -> EagerDecoder:
    return EagerDecoder(width=shape.width, layers=shape.layers, heads=shape.heads, intermediate=shape.intermediate)


def _eager_loss(decoder: EagerDecoder, weights: Weights, context: Tensor, query: Tensor, steps: int) -> Tensor:
    memory = weights["memory"].expand(len(context), -1, -1)
    memory = eager_write(decoder, memory, F.embedding(context, weights["embedding"]), context, weights["head"],
                         steps=steps, lr=INNER_LR)
    return token_loss(decoder, memory, F.embedding(query, weights["embedding"]), query, weights["head"]).mean()


def _library_decoder(shape: Shape) -> Decoder:
    return Decoder(DecoderConfig(hidden_size=shape.width, num_layers=shape.layers, num_heads=shape.heads,
                                 intermediate_size=shape.intermediate))


def _library_loss(decoder: Decoder, weights: Weights, context: Tensor, query: Tensor, steps: int, *,
                  recompute: str) -> Tensor:
    prefix = Prefix(weights["memory"].shape[-1])
    memory = weights["memory"].expand(len(context), -1, -1)
    write_loss, read_loss = (PrefixLoss(decoder, prefix, F.embedding(ids, weights["embedding"]), ids, weights["head"])
                             for ids in (context, query))
    memory = write(write_loss, memory, steps=steps, lr=INNER_LR, recompute=recompute).memory
    return read_loss(memory).mean()


def _draw(size: torch.Size, generator: torch.Generator) -> Tensor:
    """Matrices with rows of norm about 1, vectors (of the norms) about 1: activations neither vanish nor grow."""
    normal = torch.randn(size, generator=generator, dtype=torch.float64)
    return normal * size[-1] ** -0.5 if len(size) > 1 else 1 + 0.1 * normal
