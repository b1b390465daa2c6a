"""One meta-step: WRITE a context into a memory, READ a query from it, differentiate the READ loss through the WRITE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from rich.console import Group
from rich.table import Table

from benchmarks import peer
from benchmarks.harness import Options, Report, Row, gate, mebibytes, peak, relative_errors, require_parts
from benchmarks.meta_step_parts import CPU, CUDA, measure, quick, with_peer
from benchmarks.meta_step_providers import EAGER, PROVIDERS, Provider, make_step
from benchmarks.shapes import FLOP_FORMULA, Shape

__all__ = ["DEVICES", "PARTS", "PEERS", "PROVIDERS", "admit", "run", "table"]

DEVICES = ("cpu", "cuda")
PARTS = tuple(dict.fromkeys((*CPU, *CUDA)))
PEERS = True


def run(options: Options) -> Iterator[Report]:
    """A report for each of the parts named in ``options.only``, by default all of the device."""
    device = torch.device(options.device).type
    parts = CUDA if device == "cuda" else CPU
    names = options.only or tuple(parts)
    if options.quick:  # those of the other device too, by name
        parts = {name: quick(part, device) for name, part in (CUDA | CPU).items()}
    require_parts(options, parts)
    if options.peer_path:
        peer.use(options.peer_path)
        parts = {name: with_peer(part) for name, part in parts.items()}
    for name, part in parts.items():
        if name in names:
            yield measure(name, part, options)


def admit(providers: Sequence[Provider], shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu",
          ) -> tuple[dict[Provider, tuple[float, float]], list[str]]:
    """The providers that compute this shape as exactly as plain PyTorch does, with their largest relative error
    against float64 and plain PyTorch's, and why the others are refused."""
    exact = make_step(EAGER, shape, torch.float64, device=device)()
    eager = relative_errors(make_step(EAGER, shape, dtype, device=device)(), exact)
    admitted, refused = {}, []
    for provider in providers:
        errors = eager
        if provider != EAGER:
            errors = relative_errors(make_step(provider, shape, dtype, device=device)(), exact)
        reason = gate(str(provider), errors, eager)
        if reason is None:
            admitted[provider] = max(errors.values()), max(eager.values())
        else:
            refused.append(reason)
    return admitted, refused


def table(rows: Sequence[Row]) -> Group:
    """One for each part."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.step, []).append(row)
    return Group(*((_times if any(row.median_ms is not None for row in part) else _memory)(part)
                   for part in parts.values()))


def _times(rows: Sequence[Row]) -> Table:
    first = rows[0]
    out = Table(title=f"{first.step}, {first.dtype}; {_model(first, 'steps')}", caption=_caption(rows))
    columns = ("provider", "mode", "K", "ms", "20 %", "80 %", "steps/s", "of eager", "price", "TFLOP/s", "model TFLOP",
               "executed TFLOP", "peak MiB", "RSS MiB", "faults", "error")
    for column in columns:
        out.add_column(column, justify="left" if column in columns[:2] else "right", no_wrap=column in columns[:2])
    for row in (row for row in rows if row.median_ms is not None):
        out.add_row(row.provider, row.mode, str(row.shape["steps"]),
                    *(f"{ms:.2f}" for ms in (row.median_ms, row.q20_ms, row.q80_ms)), f"{1e3 / row.median_ms:.2f}",
                    _number(row.ratio_to_eager, "x"), _number(row.price, "x"), _number(row.tflops),
                    *(_number(None if n is None else n * 1e-12) for n in (row.model_flops, row.executed_flops)),
                    mebibytes(peak(row)), mebibytes(row.peak_rss_bytes), _number(row.minor_faults),
                    "-" if row.error is None else f"{row.error:.0e}")
    return out


def _memory(rows: Sequence[Row]) -> Table:
    """One line for each provider, one column for each K and S."""
    first = rows[0]
    out = Table(title=f"{first.step}: peak memory in MiB, {first.dtype}; {_model(first, 'steps', 'context_tokens')}",
                caption=_caption(rows))
    shapes = dict.fromkeys((row.shape["steps"], row.shape["context_tokens"]) for row in rows)
    for column in ("provider", "mode", *(f"K={k} S={s}" for k, s in shapes)):
        out.add_column(column, justify="left" if column in ("provider", "mode") else "right")
    for provider in dict.fromkeys((row.provider, row.mode) for row in rows):
        line = {(row.shape["steps"], row.shape["context_tokens"]): peak(row) for row in rows
                if (row.provider, row.mode) == provider}
        out.add_row(*provider, *(mebibytes(line.get(shape)) for shape in shapes))
    return out


def _caption(rows: Sequence[Row]) -> str:
    missing: dict[tuple[str, str, str], list[str]] = {}
    for row in (row for row in rows if row.unavailable is not None):
        at = "K={steps} S={context_tokens}".format(**row.shape)
        missing.setdefault((row.provider, row.mode, row.unavailable), []).append(at)
    lines = [f"FLOP/s: of {FLOP_FORMULA}", *(f"{provider} {mode} unavailable ({', '.join(at)}): {reason}"
                                             for (provider, mode, reason), at in missing.items())]
    checked = next((row.checked_shape for row in rows if row.checked_shape is not None), None)
    allocators = dict.fromkeys(row.provenance.allocator for row in rows if row.provenance.allocator)
    return "\n".join([*lines, *([f"checked on {checked}"] if checked else []), *allocators])


def _model(row: Row, *but: str) -> str:
    return ", ".join(f"{name} {size}" for name, size in row.shape.items() if name not in but)


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.3g}{unit}"
