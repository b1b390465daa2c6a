"""Attention of both orders: time, peak memory and the price of second order, against what there is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from benchmarks.attention_providers import (
    BYTE_FORMULA,
    EAGER,
    FIRST_ORDER,
    FLOP_FORMULA,
    MODES,
    PROVIDERS,
    Data,
    Provider,
    Shape,
    draw,
    head_by_head,
    prepare,
)
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
    old_objects_aside,
    peak,
    peak_bytes,
    peak_rss,
    quantiles,
    ratio,
    require_parts,
    timed,
)
from gradmem_kernels.recompute import free_memory

__all__ = ["CPU", "CUDA", "DEVICES", "PARTS", "PROVIDERS", "QUICK", "run", "table"]

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Part:
    """Shapes that are measured alike. ``modes`` without times: their peak memory alone."""

    dtype: torch.dtype
    shapes: Sequence[Shape]
    modes: Sequence[str] = MODES
    timed: bool = True


_HALF, _SINGLE = torch.bfloat16, torch.float32
#: Parts by name, the most telling first.
CUDA = {
    "headline": Part(_HALF, [Shape(1, 32, 32, 8192, 128)]),
    "long": Part(_HALF, [Shape(1, 12, 12, 32768, 64)]),
    "memory": Part(_HALF, [Shape(1, 4, 4, 2**k, 64) for k in range(10, 17)], ("double_backward",), timed=False),
    "gqa": Part(_HALF, [Shape(1, 32, 8, 8192, 128)]),
    "sweep": Part(_HALF, [Shape(16384 // s, 2048 // d, 2048 // d, s, d)
                          for d in (128, 64) for s in (1024, 2048, 4096, 8192, 16384)]),
}
CPU = {
    "small": Part(_SINGLE, [Shape(2, 4, 4, s, d) for s in (256, 1024) for d in (32, 64)]),
    "paper": Part(_SINGLE, [Shape(2, 4, 4, 2056, 32), Shape(64, 4, 4, 120, 32)]),
    "memory": Part(_SINGLE, [Shape(1, 1, 1, 2**k, 32) for k in range(10, 14)], ("double_backward",), timed=False),
}
#: Where --quick runs, whatever the part, and which parts by default.
QUICK, QUICK_PARTS = Shape(2, 4, 2, 33, 16), ("small", "memory")
PARTS = tuple(CPU | CUDA)

#: The longest sequence whose exact results are computed; longer ones are checked at this length.
CHECKED_LENGTH = {"cpu": 2048, "cuda": 16384}
#: Matrices of scores that plain PyTorch holds at once in a double backward.
MATRICES = 8


def run(options: Options) -> Iterator[Report]:
    """A report for each shape of all parts, or of those named in ``options.only``."""
    device = torch.device(options.device).type
    parts = CUDA if device == "cuda" else CPU
    if options.quick:
        parts = {name: quick(part) for name, part in (CPU | CUDA).items()}
    require_parts(options, parts)
    names = options.only or (QUICK_PARTS if options.quick else parts)
    for name, part in parts.items():
        for shape in part.shapes if name in names else ():
            yield measure(part, shape, options)


def quick(part: Part) -> Part:
    """The part on tiny shapes, in a dtype that every device computes in."""
    shapes = [QUICK] if part.timed else [replace(QUICK, length=length) for length in (32, 64)]
    return replace(part, shapes=shapes, dtype=_SINGLE)


@old_objects_aside()
def measure(part: Part, shape: Shape, options: Options) -> Report:
    """One shape: every provider in every mode is checked, then those that are right are timed, interleaved."""
    device = torch.device(options.device).type
    check_shape = replace(shape, length=min(shape.length, CHECKED_LENGTH[device]))
    providers = [provider for provider in PROVIDERS if set(provider.modes) & set(part.modes)]
    checked = check(providers, part, check_shape, options.device)
    data, found, prepared = draw(shape, part.dtype, options.device), {}, {}
    for (provider, mode), of in checked.items():
        if of.usable:
            of = of._replace(unavailable=too_large(provider, shape, part.dtype, options.device))
        if of.usable:
            make = partial(prepare, mode, provider.load(shape), data)
            of = attempt(provider.name, lambda make=make, of=of: of._replace(
                peak=peak_bytes(lambda: make()(), options.device)))
            if of.usable:
                prepared[provider, mode] = make
        found[provider, mode] = of
    samples: Mapping[tuple[Provider, str], Samples] = {}
    if part.timed:
        samples = interleave_prepared(prepared, options, clock_of(options.device))
        for key in prepared.keys() - samples.keys():
            found[key] = Found(unavailable="out of memory")
    base = Row(suite="attention", step="attention", provider="", mode="", dtype=str(part.dtype).removeprefix("torch."),
               shape=asdict(shape), checked_shape=None if check_shape == shape else asdict(check_shape),
               provenance=Provenance.here(options.device))
    rows = [_row(base, key, of, samples, shape, part.dtype) for key, of in found.items() if of.wrong is None]
    at = "B {batch} H {heads}/{kv_heads} S {length} d {head_dim}".format(**asdict(shape))
    return Report(rows, [f"{of.wrong} ({at})" for of in found.values() if of.wrong is not None])


def too_large(provider: Provider, shape: Shape, dtype: torch.dtype, device: str) -> str | None:
    """Why plain PyTorch should not try: where memory runs out on a CPU, Linux ends the process."""
    need = MATRICES * shape.batch * shape.heads * shape.length**2 * dtype.itemsize
    free = free_memory(torch.device(device))
    if provider != EAGER or torch.device(device).type != "cpu" or free is None or need < free:
        return None
    return f"would keep about {need / 2**30:.0f} GiB of score matrices"


def check(providers: Sequence[Provider], part: Part, shape: Shape, device: str) -> dict[tuple[Provider, str], Found]:
    """Every provider in every mode against float64, on this shape."""
    data = draw(shape, part.dtype, device)
    exact = head_by_head(shape, data.map(Tensor.double))
    eager = errors(head_by_head(shape, data), exact)
    found = {}
    for provider in providers:
        for mode in part.modes:
            if mode in provider.modes:
                found[provider, mode] = attempt(
                    provider.name, partial(_check, provider, mode, shape, data, exact, eager))
    return found


def _check(provider: Provider, mode: str, shape: Shape, data: Data, exact: Mapping[str, Tensor],
           eager: Mapping[str, float]) -> Found:
    return compared(f"{provider.name} {mode}", errors(prepare(mode, provider.load(shape), data)(), exact), eager)


def alone(provider: str, mode: str, shape: Shape, dtype: torch.dtype) -> Callable[[], Any]:
    """A mode and what it needs before it, for a process that runs nothing else."""
    load = next(known.load for known in PROVIDERS if known.name == provider)
    return lambda: prepare(mode, load(shape), draw(shape, dtype, "cpu"))()


def _row(base: Row, key: tuple[Provider, str], of: Found, samples: Mapping[tuple[Provider, str], Samples],
         shape: Shape, dtype: torch.dtype) -> Row:
    provider, mode = key
    cuda = base.provenance.cuda is not None
    row = replace(base, provider=provider.name, mode=mode, error=of.error, eager_error=of.eager_error,
                  unavailable=of.unavailable, **{"peak_device_bytes" if cuda else "peak_live_bytes": of.peak})
    if of.peak is not None and not cuda:
        row = replace(row, peak_rss_bytes=peak_rss(alone, provider.name, mode, shape, dtype))
    if key not in samples:
        return row
    row = replace(timed(row, samples[key], samples.get((EAGER, mode)), flops=shape.flops(mode),
                        moved=shape.bytes(mode, dtype)), flop_formula=FLOP_FORMULA, byte_formula=BYTE_FORMULA)
    first = fastest_first_order({key: of.seconds for key, of in samples.items()})
    if first is not None:
        row = replace(row, price=ratio(samples[key].seconds, first[1]), price_of=first[0].name)
    return row


def fastest_first_order(
        seconds: Mapping[tuple[Provider, str], list[float]]) -> tuple[Provider, list[float]] | None:
    """Who is fastest in forward and backward together, with the sums of each round."""
    sums = {provider: [sum(both) for both in zip(*(seconds[provider, mode] for mode in FIRST_ORDER), strict=True)]
            for provider in dict.fromkeys(provider for provider, _ in seconds)
            if all((provider, mode) in seconds for mode in FIRST_ORDER)}
    return min(sums.items(), key=lambda item: quantiles(item[1])[1], default=None)


def table(rows: Sequence[Row]) -> Group:
    """A table of times for each shape, and one of memory over the length."""
    # a part is timed or not as a whole, so a shape without any time belongs to the memory sweep
    shapes: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        shapes.setdefault(tuple(row.shape.values()), []).append(row)
    timed = [of for of in shapes.values() if any(row.median_ms is not None for row in of)]
    swept = [row for of in shapes.values() if of not in timed for row in of]
    return Group(*map(_times, timed), *([_memory(swept)] if swept else []))


def _times(rows: Sequence[Row]) -> Table:
    first = rows[0]
    title = f"attention, {first.dtype}; {', '.join(f'{name} {size}' for name, size in first.shape.items())}"
    if first.checked_shape is not None:
        title += f"; checked at length {first.checked_shape['length']}"
    yardstick = next((row.price_of for row in rows if row.price_of), "none")
    out = Table(title=title, caption=f"FLOP: {FLOP_FORMULA}\nprice: of forward and backward by {yardstick}")
    for column in ("provider", "mode", "ms", "20 %", "80 %", "of eager", "GFLOP/s", "price", "peak MiB", "RSS MiB",
                   "faults", "error"):
        out.add_column(column, justify="left" if column in ("provider", "mode") else "right")
    for row in (row for row in rows if row.unavailable is None):
        out.add_row(row.provider, row.mode, *(f"{ms:.3f}" for ms in (row.median_ms, row.q20_ms, row.q80_ms)),
                    _factor(row.ratio_to_eager), f"{1e3 * row.tflops:.0f}", _factor(row.price),
                    mebibytes(peak(row)), mebibytes(row.peak_rss_bytes), _count(row.minor_faults), f"{row.error:.0e}")
    out.caption += "".join(f"\n{line}" for line in _unavailable(rows))
    return out


def _memory(rows: Sequence[Row]) -> Table:
    """One line for each provider, one column for each length."""
    shape = ", ".join(f"{name} {size}" for name, size in rows[0].shape.items() if name != "length")
    out = Table(title=f"peak memory of the {rows[0].mode.replace('_', ' ')} in MiB, {rows[0].dtype}; {shape}")
    lengths = sorted({row.shape["length"] for row in rows})
    for column in ("provider", *(f"S={length}" for length in lengths), "bytes a row at the end"):
        out.add_column(column, justify="left" if column == "provider" else "right")
    for provider in dict.fromkeys(row.provider for row in rows):
        line = {row.shape["length"]: row for row in rows if row.provider == provider}
        peaks = [(s, peak(row)) for s, row in sorted(line.items()) if peak(row) is not None]
        growth = (peaks[-1][1] - peaks[-2][1]) / (peaks[-1][0] - peaks[-2][0]) if len(peaks) > 1 else None
        if peaks:
            out.add_row(provider, *(mebibytes(peak(line[s])) if s in line else "-" for s in lengths),
                        "-" if growth is None else f"{growth:.0f}")
    out.caption = "\n".join(_unavailable(rows))
    return out


def _unavailable(rows: Sequence[Row]) -> list[str]:
    """Who has no numbers where, and why."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in (row for row in rows if row.unavailable is not None):
        found.setdefault((row.provider, row.unavailable), []).append(row)
    lines = []
    for (provider, reason), missing in found.items():
        modes = dict.fromkeys(row.mode for row in missing)
        lengths = dict.fromkeys(str(row.shape["length"]) for row in missing)
        lines.append(f"{provider} unavailable ({', '.join(modes)}; S={', '.join(lengths)}): {reason}")
    return lines


def _factor(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:.0f}"
