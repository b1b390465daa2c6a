"""Memory of a meta-step over K and S: what the library's model says, and what a step holds on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from benchmarks.harness import Options, Report, Row
from benchmarks.live_memory import peak_live_bytes
from benchmarks.meta_step_providers import PROVIDERS, Provider, make_step
from benchmarks.on_meta import triton_on_meta
from benchmarks.shapes import LLAMA_1B, QUICK, Shape
from gradmem_kernels import Decoder, Prefix, PrefixLoss

__all__ = ["LENGTHS", "PROVIDERS", "STEPS", "measured_bytes", "model_bytes", "run", "table"]

STEPS = (1, 2, 4, 8, 16, 32)
LENGTHS = tuple(2**k for k in range(10, 16))
#: Measured, beside modelled, are every K at the shortest of these lengths, and few at the others.
MEASURED_LENGTHS, FEW_STEPS = (1024, 2048, 4096, 8192), (1, 2)
FORMULA = "weights, two copies of their gradients, K memories in float32, and the activations of PrefixLoss.footprint"


def run(options: Options) -> Iterator[Report]:
    """A row for every mode, K and S; the measured ones take seconds each."""
    base, lengths, steps = (QUICK, (8, 16), (1, 2, 4)) if options.quick else (LLAMA_1B, LENGTHS, STEPS)
    rows = []
    for provider in PROVIDERS[1:]:
        for shape in (replace(base, context_tokens=s, steps=k) for s in lengths for k in steps):
            rows.append(Row(
                suite="footprint", step="meta-step", provider=provider.name, mode=provider.mode, dtype="bfloat16",
                shape=asdict(shape), model_bytes=model_bytes(provider, shape), byte_formula=FORMULA,
                peak_live_bytes=measured_bytes(provider, shape) if options.quick or _is_measured(shape) else None))
    yield Report(rows)


def model_bytes(provider: Provider, shape: Shape) -> int:
    """Bytes of a meta-step in bfloat16 after :data:`FORMULA`, weights included.

    One copy of the gradients is a step's own, the other the sum of what came before it, from READ on.
    """
    with torch.device("meta"):
        decoder = Decoder(shape.config(), dtype=torch.bfloat16)
        tables = [torch.nn.Parameter(torch.empty(shape.vocabulary, shape.width, dtype=torch.bfloat16))
                  for _ in range(1 if shape.tied else 2)]
        context = torch.empty(shape.batch, shape.context_tokens, shape.width, dtype=torch.bfloat16)
        memory = torch.empty(shape.batch, shape.memory_tokens, shape.width)
        labels = torch.zeros(shape.batch, shape.context_tokens, dtype=torch.int64)  # they are checked
        loss = PrefixLoss(decoder, Prefix(shape.width), context, labels, tables[-1])
    weights = sum(map(_bytes, (*decoder.parameters(), *tables)))
    # it has gradients too, of the tensors that it reads, twice if there is a second step
    gradients = sum(map(_bytes, loss.params)) * min(shape.steps, 2)
    activations = loss.footprint(memory, steps=shape.steps, recompute=provider.mode) - gradients
    return 3 * weights + shape.steps * _bytes(memory) + activations


def measured_bytes(provider: Provider, shape: Shape) -> int:
    """The most bytes alive at once in a meta-step in bfloat16 on the meta device, weights included."""
    made: list[int] = []
    with triton_on_meta():
        step = make_step(provider, shape, torch.bfloat16, device="meta")
        peak = peak_live_bytes(lambda: made.extend(_bytes(t) for t in step()[1].values()))
    # gradients are as large as the weights
    return sum(made) + peak


def _is_measured(shape: Shape) -> bool:
    steps = STEPS if shape.context_tokens == MEASURED_LENGTHS[0] else FEW_STEPS
    return shape.context_tokens in MEASURED_LENGTHS and shape.steps in steps


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def table(rows: Sequence[Row]) -> Group:
    """For each mode a line for each K and a column for each S: model, measured, and their ratio."""
    model = ", ".join(f"{name} {size}" for name, size in rows[0].shape.items()
                      if name not in ("steps", "context_tokens"))
    tables = []
    for mode in dict.fromkeys(row.mode for row in rows):
        cells = {(row.shape["steps"], row.shape["context_tokens"]): row for row in rows if row.mode == mode}
        out = Table(title=f"gradmem {mode}: GiB of a meta-step, {rows[0].dtype}; {model}",
                    caption="model; measured, model / measured")
        lengths = dict.fromkeys(s for _, s in cells)
        out.add_column("K", justify="right")
        for s in lengths:
            out.add_column(f"S={s}", justify="right")
        for k in dict.fromkeys(k for k, _ in cells):
            out.add_row(str(k), *(_cell(cells[k, s]) for s in lengths))
        tables.append(out)
    return Group(*tables)


def _cell(row: Row) -> str:
    model = f"{row.model_bytes / 2**30:.2f}"
    if row.peak_live_bytes is None:
        return model
    return f"{model}; {row.peak_live_bytes / 2**30:.2f}, {row.model_bytes / row.peak_live_bytes:.2f}"
