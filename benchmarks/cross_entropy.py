"""Cross-entropy of a linear head in every order: time and peak memory against plain PyTorch and its chunked loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Group
from rich.table import Table
from torch import Tensor

from benchmarks.harness import (
    Found,
    Options,
    Provenance,
    Report,
    Row,
    Samples,
    attempt,
    clock_of,
    compared,
    errors,
    interleave_prepared,
    mebibytes,
    peak,
    peak_bytes,
    peak_rss,
    timed,
)
from gradmem_kernels import linear_cross_entropy, linear_cross_entropy_dual

__all__ = ["CPU", "CUDA", "DEVICES", "PROVIDERS", "QUICK", "Shape", "run", "table"]

DEVICES = ("cpu", "cuda")
#: Matrix products of 2 B S V D operations that each mode needs, gradients of hidden and weight included.
PRODUCTS = {"forward_backward": 3, "double_backward": 7, "dual": 6}
FLOP_FORMULA = "n * 2 B S V D; n = " + ", ".join(f"{n} {mode}" for mode, n in PRODUCTS.items())
#: Tensors of hidden's and of weight's size that a mode reads or writes, each once.
TENSORS = {"forward_backward": (2, 2), "double_backward": (3, 3), "dual": (4, 2)}
BYTE_FORMULA = "hidden, weight, what they are differentiated along and their gradients, each read or written once"
#: Positions of a sample at most on which errors are measured: float64 with all logits has to fit.
CHECKED_LENGTH = 256


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    width: int
    vocabulary: int

    def flops(self, mode: str) -> float:
        """Operations that a mode must spend, after :data:`FLOP_FORMULA`."""
        return PRODUCTS[mode] * 2.0 * self.batch * self.length * self.vocabulary * self.width

    def bytes(self, mode: str, dtype: torch.dtype) -> int:
        """What a mode must move at least, after :data:`BYTE_FORMULA`."""
        hidden, weight = TENSORS[mode]
        return dtype.itemsize * self.width * (hidden * self.batch * self.length + weight * self.vocabulary)


CUDA = (torch.bfloat16, [Shape(4, 2048, 2048, 128256), Shape(4, 512, 2048, 128256), Shape(4, 2048, 1024, 50257),
                         Shape(64, 112, 128, 62)])
CPU = (torch.float32, [Shape(4, 64, 128, 8192), Shape(1, 32, 64, 128256), Shape(64, 112, 128, 62)])
QUICK = (torch.float32, [Shape(2, 9, 16, 50)])


class Data(NamedTuple):
    """Inputs, and what they are differentiated along; ``bars`` are the cotangents of loss and loss_t."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    hidden_u: Tensor
    weight_u: Tensor
    bars: Tensor

    def double(self) -> Data:
        return Data(*(t.double() if t.is_floating_point() else t for t in self))


@dataclass(frozen=True)
class Provider:
    """``loss(data, hidden, weight) -> [B]`` and ``dual(data, hidden, weight, hidden_t) -> (loss, loss_t)``."""

    name: str
    loss: Callable[[Data, Tensor, Tensor], Tensor] | None
    dual: Callable[[Data, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None
    modes: Sequence[str] = tuple(PRODUCTS)


def eager(data: Data, hidden: Tensor, weight: Tensor) -> Tensor:
    """As anyone would write it."""
    logits = F.linear(hidden, weight).flatten(0, 1)
    rows = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), data.labels.flatten(),
                           reduction="none")
    return rows.view(data.labels.shape).mean(1)


def eager_dual(data: Data, hidden: Tensor, weight: Tensor, hidden_t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.func.jvp(lambda hidden: eager(data, hidden, weight), (hidden,), (hidden_t,))


def _announced_dual(data: Data, hidden: Tensor, weight: Tensor, hidden_t: Tensor) -> tuple[Tensor, Tensor]:
    loss_bar, loss_t_bar = data.bars
    return linear_cross_entropy_dual(hidden, weight, data.labels, hidden_t, loss_bar=loss_bar, loss_t_bar=loss_t_bar)


def _torch_chunked(data: Data, hidden: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own, which has one loss for all: of samples of one length and equal cotangents."""
    rows = F.linear_cross_entropy(hidden.flatten(0, 1), weight, data.labels.flatten(), reduction="none",
                                  options=torch.nn.LinearCrossEntropyOptions())
    return rows.view(data.labels.shape).mean(1)


PROVIDERS = (
    Provider("eager", eager, eager_dual),
    Provider("gradmem", lambda data, hidden, weight: linear_cross_entropy(hidden, weight, data.labels),
             lambda data, hidden, weight, hidden_t: linear_cross_entropy_dual(hidden, weight, data.labels, hidden_t)),
    Provider("gradmem-announced",
             lambda data, hidden, weight: linear_cross_entropy(hidden, weight, data.labels, loss_bar=data.bars[0]),
             _announced_dual, ("forward_backward", "dual")),
    Provider("torch-chunked", _torch_chunked, None, ("forward_backward",)),
)


def draw(shape: Shape, dtype: torch.dtype, device: str) -> Data:
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.batch, shape.length, shape.width)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

    labels = torch.randint(shape.vocabulary, size[:2], generator=generator, device=device)
    bars = torch.rand(2, shape.batch, generator=generator, device=device) + 0.5
    return Data(normal(*size), normal(shape.vocabulary, shape.width, scale=shape.width**-0.5), labels, normal(*size),
                normal(shape.vocabulary, shape.width, scale=shape.width**-0.5), bars)


def prepare(mode: str, provider: Provider, data: Data) -> Callable[[], dict[str, Tensor]]:
    """The timed work of a mode; what it needs before is done here."""
    hidden, weight, hidden_t = (t.detach().requires_grad_() for t in (data.hidden, data.weight, data.hidden_u))
    if mode == "forward_backward":
        return lambda: _gradients([provider.loss(data, hidden, weight)], [data.bars[0]], (hidden, weight))
    if mode == "dual":
        return lambda: _gradients(provider.dual(data, hidden, weight, hidden_t), tuple(data.bars),
                                  (hidden, weight, hidden_t))
    first = torch.autograd.grad(provider.loss(data, hidden, weight), (hidden, weight), data.bars[0], create_graph=True)
    return lambda: _gradients(first, (data.hidden_u, data.weight_u), (hidden, weight))


def _gradients(outputs: Sequence[Tensor], bars: Sequence[Tensor], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    names = ("hidden", "weight", "hidden_t")
    found = torch.autograd.grad(outputs, inputs, [b.to(y.dtype) for y, b in zip(outputs, bars, strict=True)],
                                retain_graph=True)
    return {**{f"output {i}": y.detach() for i, y in enumerate(outputs)}, **dict(zip(names, found, strict=False))}


def run(options: Options) -> Iterator[Report]:
    """A report for each shape of the device."""
    device = torch.device(options.device).type
    dtype, shapes = QUICK if options.quick else CUDA if device == "cuda" else CPU
    for shape in shapes:
        yield measure(shape, dtype, options)


def measure(shape: Shape, dtype: torch.dtype, options: Options) -> Report:
    """One shape: every provider in every mode is checked, then those that are right are timed, interleaved."""
    checked = replace(shape, length=min(shape.length, CHECKED_LENGTH))
    base = Row(suite="cross-entropy", step="linear_cross_entropy", provider="", mode="", dtype=str(dtype)[6:],
               shape=asdict(shape), checked_shape=None if checked == shape else asdict(checked),
               flop_formula=FLOP_FORMULA, byte_formula=BYTE_FORMULA, provenance=Provenance.here(options.device))
    cuda = base.provenance.cuda is not None
    small, data = draw(checked, dtype, options.device), draw(shape, dtype, options.device)
    found: dict[tuple[str, str], Row] = {}
    prepared, refused = {}, []
    for mode in PRODUCTS:
        exact = prepare(mode, PROVIDERS[0], small.double())()
        plain = errors(prepare(mode, PROVIDERS[0], small)(), exact)
        for provider in (provider for provider in PROVIDERS if mode in provider.modes):
            make = partial(prepare, mode, provider, data)
            of = attempt(f"{provider.name} {mode}", partial(_check, mode, provider, small, exact, plain))
            if of.usable:
                of = attempt(f"{provider.name} {mode}", lambda make=make, of=of: of._replace(
                    peak=peak_bytes(lambda: make()(), options.device)))
            if of.wrong is not None:
                refused.append(of.wrong)
                continue
            found[provider.name, mode] = replace(
                base, provider=provider.name, mode=mode, error=of.error, eager_error=of.eager_error,
                unavailable=of.unavailable, **{"peak_device_bytes" if cuda else "peak_live_bytes": of.peak},
                peak_rss_bytes=peak_rss(alone, provider.name, mode, shape, dtype) if of.usable and not cuda else None)
            if of.usable:
                prepared[provider.name, mode] = make
    samples = interleave_prepared(prepared, options, clock_of(options.device))
    for key in prepared.keys() - samples.keys():
        found[key] = replace(base, provider=key[0], mode=key[1], unavailable="out of memory")
    return Report([_timed(row, samples, shape, dtype) for row in found.values()], refused)


def _check(mode: str, provider: Provider, data: Data, exact: Mapping[str, Tensor],
           plain: Mapping[str, float]) -> Found:
    return compared(f"{provider.name} {mode}", errors(prepare(mode, provider, data)(), exact), plain)


def alone(provider: str, mode: str, shape: Shape, dtype: torch.dtype) -> Callable[[], Any]:
    """A mode and what it needs before it, for a process that runs nothing else."""
    who = next(known for known in PROVIDERS if known.name == provider)
    return lambda: prepare(mode, who, draw(shape, dtype, "cpu"))()


def _timed(row: Row, samples: Mapping[tuple[str, str], Samples], shape: Shape, dtype: torch.dtype) -> Row:
    ours = samples.get((row.provider, row.mode))
    if ours is None:
        return row
    return timed(row, ours, samples.get(("eager", row.mode)), flops=shape.flops(row.mode),
                 moved=shape.bytes(row.mode, dtype))


def table(rows: Sequence[Row]) -> Group:
    """A table for each shape."""
    shapes: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        shapes.setdefault(tuple(row.shape.values()), []).append(row)
    return Group(*map(_table, shapes.values()))


def _table(rows: Sequence[Row]) -> Table:
    shape = ", ".join(f"{name} {size}" for name, size in rows[0].shape.items())
    out = Table(title=f"linear_cross_entropy, {rows[0].dtype}; {shape}", caption=f"FLOP: {FLOP_FORMULA}")
    for column in ("provider", "mode", "ms", "20 %", "80 %", "of eager", "GFLOP/s", "peak MiB", "RSS MiB", "error"):
        out.add_column(column, justify="left" if column in ("provider", "mode") else "right")
    for row in rows:
        if row.median_ms is None:
            out.caption += f"\n{row.provider} {row.mode} unavailable: {row.unavailable}"
            continue
        ratio = "-" if row.ratio_to_eager is None else f"{row.ratio_to_eager:.2f}x"
        out.add_row(row.provider, row.mode, *(f"{ms:.3f}" for ms in (row.median_ms, row.q20_ms, row.q80_ms)), ratio,
                    f"{1e3 * row.tflops:.0f}", mebibytes(peak(row)), mebibytes(row.peak_rss_bytes), f"{row.error:.0e}")
    return out
