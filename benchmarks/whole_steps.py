"""Steps that users wait for, each provider's checked, measured and timed in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Group
from rich.table import Table

from benchmarks.harness import (
    Found,
    Options,
    Provenance,
    Report,
    Result,
    Row,
    Samples,
    attempt,
    clock_of,
    compared,
    interleave_prepared,
    mebibytes,
    peak,
    peak_bytes,
    peak_rss,
    relative_errors,
    timed,
)
from benchmarks.meta_step_providers import EAGER, Provider
from benchmarks.shapes import Shape

__all__ = ["Case", "Need", "measure", "table"]


class Need(NamedTuple):
    """What a call does: steps of the kind that is counted, tokens read, and operations and bytes that it must spend."""

    steps: int
    tokens: int
    flops: float
    moved: float


class Case(NamedTuple):
    """``checked``: the shape on which results are compared, where float64 does not fit at ``shape``. ``exact``: whether
    the values, which are those of ``dtype``, are computed with in float64."""

    step: str
    provider: Provider
    shape: Shape
    dtype: torch.dtype
    checked: Shape | None = None
    exact: bool = False

    @property
    def computed(self) -> torch.dtype:
        return torch.float64 if self.exact else self.dtype


#: ``(case, device)``: the result that is checked, or the prepared work that is timed.
Check = Callable[[Case, str], Result]
Prepare = Callable[[Case, str], Callable[[], Any]]


def measure(suite: str, cases: Sequence[Case], options: Options, check: Check, prepare: Prepare,
            need: Callable[[Case], Need], formulas: Mapping[str, str]) -> Report:
    """Every case whose provider computes what plain PyTorch does gets peak memory and, interleaved, times.

    Args:
        suite: its name.
        cases: what is measured, plain PyTorch among them.
        options: of the command.
        check, prepare: functions of a module; ``prepare`` also runs in a process of its own.
        need: what a call needs.
        formulas: ``flop_formula`` and ``byte_formula`` of a row.
    """
    device, where, rows, refused, prepared = options.device, Provenance.here(options.device), {}, [], {}
    plain = next(case.provider for case in cases if case.provider.name == EAGER.name)
    cuda = where.cuda is not None
    for case in cases:
        dtype = str(case.dtype).removeprefix("torch.")
        row = Row(suite=suite, step=case.step, provider=case.provider.name, mode=case.provider.mode, dtype=dtype,
                  shape=asdict(case.shape), checked_shape=None if case.checked is None else asdict(case.checked),
                  provenance=where)
        name = f"{case.provider} {case.step}"
        of = attempt(name, partial(_check, name, case, plain, check, device))
        # a graph's memory was taken when it was captured
        if of.usable and not case.provider.name.endswith("-graph"):
            of = attempt(name, lambda case=case, of=of: of._replace(peak=peak_bytes(prepare(case, device), device)))
        if of.wrong is not None:
            refused.append(of.wrong)
            continue
        rows[case] = replace(
            row, error=of.error, eager_error=of.eager_error, unavailable=of.unavailable,
            peak_rss_bytes=peak_rss(prepare, case, device) if of.usable and not cuda else None,
            **{"peak_device_bytes" if cuda else "peak_live_bytes": of.peak})
        if of.usable:
            prepared[case] = partial(prepare, case, device)
    samples = interleave_prepared(prepared, options, clock_of(device))
    for case in prepared.keys() - samples.keys():
        rows[case] = replace(rows[case], unavailable="out of memory")
    for case, times in samples.items():
        rows[case] = _timed(rows[case], times, samples.get(case._replace(provider=plain)), need(case), formulas)
    return Report(list(rows.values()), refused)


def _check(name: str, case: Case, plain: Provider, check: Check, device: str) -> Found:
    small = case._replace(shape=case.checked or case.shape)
    exact, eager = (check(small._replace(provider=plain, exact=t), device) for t in (True, False))
    expected, ours = (relative_errors(result, exact) for result in (eager, check(small, device)))
    return compared(name, ours, expected)


def _timed(row: Row, times: Samples, eager: Samples | None, need: Need, formulas: Mapping[str, str]) -> Row:
    row = timed(row, times, eager, flops=need.flops, moved=need.moved)
    rate = 1e3 / row.median_ms
    return replace(row, steps_per_second=rate * need.steps, tokens_per_second=rate * need.tokens, **formulas)


def table(rows: Sequence[Row]) -> Group:
    """A table for each step and shape."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.step, row.dtype, *row.shape.values()), []).append(row)
    return Group(*map(_table, groups.values()))


def _table(rows: Sequence[Row]) -> Table:
    first = rows[0]
    shape = ", ".join(f"{name} {size}" for name, size in first.shape.items())
    out = Table(title=f"{first.suite}: {first.step}, {first.dtype}; {shape}", caption=first.provenance.allocator)
    for column in ("provider", "mode", "ms", "20 %", "80 %", "of eager", "steps/s", "tokens/s", "GFLOP/s", "peak MiB",
                   "RSS MiB", "faults", "error"):
        out.add_column(column, justify="left" if column in ("provider", "mode") else "right", no_wrap=True)
    for row in rows:
        if row.median_ms is None:
            out.caption = f"{out.caption}\n{row.provider} {row.mode} unavailable: {row.unavailable}"
            continue
        faults = "-" if row.minor_faults is None else f"{row.minor_faults:.0f}"
        out.add_row(row.provider, row.mode, *(f"{ms:.2f}" for ms in (row.median_ms, row.q20_ms, row.q80_ms)),
                    "-" if row.ratio_to_eager is None else f"{row.ratio_to_eager:.2f}x", f"{row.steps_per_second:.2f}",
                    f"{row.tokens_per_second:.0f}", f"{1e3 * row.tflops:.1f}", mebibytes(peak(row)),
                    mebibytes(row.peak_rss_bytes), faults, f"{row.error:.0e}")
    return out
