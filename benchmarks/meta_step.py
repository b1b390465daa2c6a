"""One meta-step: WRITE a context into a memory, READ a query from it, differentiate the READ loss through the WRITE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Group
from rich.table import Table

from benchmarks import flops
from benchmarks.harness import (
    Options,
    Report,
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
from benchmarks.meta_step_parts import CPU, CUDA, measure, tables
from benchmarks.meta_step_providers import EAGER, FLOP_FORMULA, PAPER, PROVIDERS, QUICK, Provider, Shape, make_step

__all__ = ["DEVICES", "PARTS", "PROVIDERS", "admit", "run", "table"]

DEVICES = ("cpu", "cuda")
#: On a CPU "paper" alone is the default: the others are long.
PARTS = tuple(dict.fromkeys(("paper", *CPU, *CUDA)))


def run(options: Options) -> Report:
    """The parts named in ``options.only``; by default all of a GPU, and on a CPU the paper's model."""
    cuda = torch.device(options.device).type == "cuda"
    known = tuple(CUDA) if cuda else ("paper", *CPU)
    if unknown := set(options.only) - set(known):
        raise SystemExit(f"--only: expected parts of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    names = [name for name in known if name in options.only] or (known if cuda else ("paper",))
    parts = CUDA if cuda else CPU
    reports = [measure(name, parts[name], options) if name in parts else _paper(options) for name in names]
    return Report([row for report in reports for row in report.rows],
                  [reason for report in reports for reason in report.refused])


def table(rows: Sequence[Row]) -> Group:
    """The rows as people read them."""
    here = [row for row in rows if row.minor_faults is not None]
    return Group(*([_table(here)] if here else []), *tables([row for row in rows if row.minor_faults is None]))


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


def _paper(options: Options) -> Report:
    """On a CPU: time, page faults and peak memory of every provider, interleaved."""
    shape = QUICK if options.quick else PAPER
    admitted, refused = admit(PROVIDERS, shape)
    steps = {provider: make_step(provider, shape) for provider in admitted}
    samples = interleave(steps, options)
    rows = []
    for provider, errors in admitted.items():
        executed = sum(flops.executed(steps[provider]).values())
        rows.append(_row(provider, shape, samples, peak_live_bytes(steps[provider]), executed, errors))
    return Report(rows, refused)


def _table(rows: Sequence[Row]) -> Table:
    shape = ", ".join(f"{name} {size}" for name, size in rows[0].shape.items())
    out = Table(title=f"meta-step, {rows[0].dtype}; {shape}",
                caption=f"GFLOP/s: of {FLOP_FORMULA}\n"
                        "model, executed: GFLOP of a step's matrix products, after the cost model and counted")
    for column in ("provider", "mode", "ms", "20 %", "80 %", "of eager", "GFLOP/s", "model", "executed",
                   "live MiB", "of eager", "RSS MiB", "faults", "error"):
        out.add_column(column, justify="left" if column in ("provider", "mode") else "right", no_wrap=True)
    eager = next(row.peak_live_bytes for row in rows if row.provider == EAGER.name)
    for row in rows:
        out.add_row(row.provider, row.mode, *(f"{ms:.1f}" for ms in (row.median_ms, row.q20_ms, row.q80_ms)),
                    _ratio(row.ratio_to_eager), f"{1e3 * row.tflops:.1f}",
                    *(_gigaflops(n) for n in (row.model_flops, row.executed_flops)), mebibytes(row.peak_live_bytes),
                    _ratio(row.peak_live_bytes / eager), mebibytes(row.peak_rss_bytes), f"{row.minor_faults:.0f}",
                    f"{row.error:.0e}")
    return out


def _row(provider: Provider, shape: Shape, samples: dict[Provider, Samples], peak: int, executed: float,
         errors: tuple[float, float]) -> Row:
    seconds = samples[provider].seconds
    q20, median, q80 = (1e3 * t for t in quantiles(seconds))
    ratios = [ours / eager for ours, eager in zip(seconds, samples[EAGER].seconds, strict=True)]
    process = in_fresh_process(measure_process, make_step, (provider, shape), torch.get_num_threads())
    return Row(
        suite="meta-step", step="meta-step", provider=provider.name, mode=provider.mode, dtype="float32",
        shape=asdict(shape), median_ms=median, q20_ms=q20, q80_ms=q80, repeats=len(seconds),
        ratio_to_eager=quantiles(ratios)[1], tflops=shape.flops() / median * 1e-9, flop_formula=FLOP_FORMULA,
        model_flops=None if provider == EAGER else sum(flops.model(shape, provider.mode).values()),
        executed_flops=executed, peak_live_bytes=peak, peak_rss_bytes=process.peak_rss_bytes,
        minor_faults=process.minor_faults, error=errors[0], eager_error=errors[1])


def _gigaflops(operations: float | None) -> str:
    return "-" if operations is None else f"{operations * 1e-9:.2f}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x"
