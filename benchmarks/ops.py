"""Norms, activations and rotary of every order: time and bandwidth, against plain PyTorch and what it has itself.

Each of these ops is bound by memory, so a row says which share of the memory's speed a kernel reaches: the bytes that
the mode has to move at least (:data:`benchmarks.ops_providers.BYTE_FORMULA`) over its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
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
    require_parts,
    timed,
)
from benchmarks.ops_providers import BYTE_FORMULA, COMPILED, EAGER, OPS, PROVIDERS, Named, Op, Work, draw

__all__ = ["CPU", "CUDA", "DEVICES", "PARTS", "PROVIDERS", "QUICK", "run", "table"]

DEVICES = ("cpu", "cuda")
Shapes = Mapping[str, Sequence[Mapping[str, int]]]


def _shapes(rows: int, norms: Sequence[int], activations: Sequence[int], heads: int, d: int) -> Shapes:
    def of(widths: Sequence[int]) -> list[Mapping[str, int]]:
        return [{"rows": rows, "width": width} for width in widths]

    return {**dict.fromkeys(("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"), of(norms)),
            **dict.fromkeys(("swiglu", "gelu", "gelu_tanh"), of(activations)),
            "rotary": [{"batch": 1, "heads": heads, "rows": rows, "d": d}]}


CUDA = _shapes(16384, (1024, 4096, 8192), (4096, 14336), 32, 128)
CPU = _shapes(1024, (256, 1024), (1024,), 8, 64)
QUICK = _shapes(6, (16,), (16,), 2, 8)
PARTS = tuple(OPS)


def run(options: Options) -> Iterator[Report]:
    """A report for each shape of all ops, or of those named in ``options.only``."""
    device = torch.device(options.device).type
    shapes = QUICK if options.quick else CUDA if device == "cuda" else CPU
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    require_parts(options, OPS)
    for name, op in OPS.items():
        for shape in shapes[name] if name in options.only or not options.only else ():
            yield measure(op, shape, dtype, options)


def measure(op: Op, shape: Mapping[str, int], dtype: torch.dtype, options: Options) -> Report:
    """One shape: every provider in every mode is checked, then those that are right are timed, interleaved."""
    data = draw(op, shape, dtype, options.device)
    rows, refused, prepared = {}, [], {}
    base = Row(suite="ops", step=op.name, provider="", mode="", dtype=str(dtype).removeprefix("torch."), shape=shape,
               provenance=Provenance.here(options.device))
    for mode in op.passes:
        exact = {name: t.detach() for name, t in EAGER.prepare(op, mode, data.map(Tensor.double))().items()}
        eager = errors(EAGER.prepare(op, mode, data)(), exact)
        for provider in PROVIDERS:
            name, make = f"{provider.name} {op.name} {mode}", partial(provider.prepare, op, mode, data)
            of = attempt(name, partial(_check, name, make, exact, eager))
            if of.wrong is not None:
                refused.append(f"{of.wrong} ({_text(shape)})")
                continue
            row = replace(base, provider=provider.name, mode=mode, error=of.error, eager_error=of.eager_error,
                          unavailable=of.unavailable)
            if of.usable:
                row, prepared[provider, mode] = _with_memory(row, make, options.device), make
            rows[provider, mode] = row
    samples = interleave_prepared(prepared, options, clock_of(options.device))
    for key in prepared.keys() - samples.keys():
        rows[key] = replace(rows[key], unavailable="out of memory")
    for key, times in samples.items():
        rows[key] = _timed(rows[key], times, samples.get((EAGER, key[1])), op)
    return Report(list(rows.values()), refused)


def _check(name: str, make: Callable[[], Work], exact: Named, eager: Mapping[str, float]) -> Found:
    return compared(name, errors(make()(), exact), eager)


def _with_memory(row: Row, make: Callable[[], Work], device: str) -> Row:
    """What the mode and what it needs before it hold. What is compiled is not compiled under the eyes of a counter of
    live tensors, and has no numbers on a CPU."""
    cuda = row.provenance.cuda is not None
    if row.provider == COMPILED and not cuda:
        return row
    most = peak_bytes(lambda: make()(), device)
    if cuda:
        return replace(row, peak_device_bytes=most)
    return replace(row, peak_live_bytes=most,
                   peak_rss_bytes=peak_rss(alone, row.provider, row.step, row.mode, row.shape, row.dtype))


def alone(provider: str, op: str, mode: str, shape: Mapping[str, int], dtype: str) -> Work:
    """A mode and what it needs before it, for a process that runs nothing else."""
    who, data = next(p for p in PROVIDERS if p.name == provider), draw(OPS[op], shape, getattr(torch, dtype), "cpu")
    return who.prepare(OPS[op], mode, data)


def _timed(row: Row, samples: Samples, eager: Samples | None, op: Op) -> Row:
    moved = op.bytes(row.mode, row.shape, getattr(torch, row.dtype))
    return replace(timed(row, samples, eager, moved=moved), byte_formula=BYTE_FORMULA)


def _text(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in shape.items())


def table(rows: Sequence[Row]) -> Group:
    """A table for each op and shape."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.step, *row.shape.values()), []).append(row)
    return Group(*map(_table, groups.values()))


def _table(rows: Sequence[Row]) -> Table:
    first = rows[0]
    out = Table(title=f"{first.step}, {first.dtype}; {_text(first.shape)}")
    for column in ("mode", "provider", "ms", "20 %", "80 %", "of eager", "GB/s", "peak MiB", "RSS MiB", "error"):
        out.add_column(column, justify="left" if column in ("mode", "provider") else "right")
    for row in (row for row in rows if row.unavailable is None and row.median_ms is not None):
        out.add_row(row.mode, row.provider, *(f"{ms:.3f}" for ms in (row.median_ms, row.q20_ms, row.q80_ms)),
                    f"{row.ratio_to_eager:.2f}x" if row.ratio_to_eager else "-", f"{row.gigabytes_per_second:.1f}",
                    mebibytes(peak(row)), mebibytes(row.peak_rss_bytes), f"{row.error:.0e}")
    missing = {(row.provider, row.unavailable): None for row in rows if row.unavailable is not None}
    out.caption = "\n".join(f"{provider} unavailable: {reason}" for provider, reason in missing)
    return out
