"""The result row, with its provenance, and the files that rows are kept in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS, Provenance, check_storable

__all__ = ["OTHERS", "PAPER_CODE", "Report", "Row", "append", "key", "load", "mebibytes", "merged", "peak", "store"]

PAPER_CODE = "paper-code"
#: Providers of one mode that are not the library's, as tables and plots call them.
OTHERS = {"eager": "plain eager", PAPER_CODE: "the paper's code"}


@dataclass(frozen=True)
class Row:
    """One result. ``None``: not measured by this suite. Times in milliseconds, quantiles 0.2 and 0.8 beside medians."""

    suite: str
    step: str
    provider: str
    mode: str
    dtype: str
    shape: Mapping[str, int]
    median_ms: float | None = None
    q20_ms: float | None = None
    q80_ms: float | None = None
    repeats: int | None = None
    #: Median of the ratios within each round of the interleaved run.
    ratio_to_eager: float | None = None
    tflops: float | None = None
    flop_formula: str | None = None
    #: Operations of the products of a step: after the cost model, and counted from those that run.
    model_flops: float | None = None
    executed_flops: float | None = None
    #: What a second is enough for: steps of the kind that the row is about, and tokens that they read.
    steps_per_second: float | None = None
    tokens_per_second: float | None = None
    #: Operations and bytes that the step must spend, after the formulas; what this machine reached in the same run in a
    #: large matrix product of this dtype and in a large copy; and the time that the slower of both would take at least,
    #: over the time taken.
    must_flops: float | None = None
    must_bytes: float | None = None
    ceiling_flops: float | None = None
    ceiling_bytes_s: float | None = None
    roofline: float | None = None
    #: The bytes that the step has to move at least, over its time.
    gigabytes_per_second: float | None = None
    byte_formula: str | None = None
    peak_live_bytes: int | None = None
    #: The highest resident set of a fresh process that does this alone, and page faults per call of the timed run.
    peak_rss_bytes: int | None = None
    minor_faults: float | None = None
    #: Of the same after a model, from sizes alone.
    model_bytes: int | None = None
    #: The most that PyTorch's allocator had handed out at once on the GPU, less what lived before.
    peak_device_bytes: int | None = None
    #: Of the GPU's cache before each timed call: "flushed", or None on a CPU.
    l2: str | None = None
    #: Median of the ratios, within each round, to first order alone, and who ran that.
    price: float | None = None
    price_of: str | None = None
    #: The largest relative error of the loss and the gradients against float64, and plain PyTorch's own.
    error: float | None = None
    eager_error: float | None = None
    #: The shape on which errors were measured, where it is not ``shape``.
    checked_shape: Mapping[str, int] | None = None
    #: Why there are no numbers: not installed, refused by the provider, out of memory.
    unavailable: str | None = None
    provenance: Provenance = field(default_factory=Provenance.here)


@dataclass(frozen=True)
class Report:
    """What a suite hands back: rows worth storing, and what it refused to measure, with the reasons."""

    rows: Sequence[Row]
    refused: Sequence[str] = ()


def store(report: Report, suite: str) -> Path:
    """Appends the rows to the suite's results.

    Raises:
        SystemExit: if their commit does not tell what was measured.
    """
    for row in report.rows:
        check_storable(row.provenance)
    path = RESULTS / f"{suite}.jsonl"
    append(path, report.rows)
    return path


def append(path: Path, rows: Iterable[Row]) -> None:
    """Writes the rows to the end of a file, one JSON object a line."""
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def load(path: Path) -> list[Row]:
    """Rows that were stored, in their order; fields that a file is too old for are ``None``."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Row(**{**values, "provenance": Provenance(**values["provenance"])}) for values in map(json.loads, lines)]


def merged(reports: Iterable[Report]) -> Report:
    """All rows and all refusals of several reports."""
    rows, refused = [], []
    for report in reports:
        rows += report.rows
        refused += report.refused
    return Report(rows, refused)


def key(row: Row) -> tuple[Any, ...]:
    """What a row is about: two rows of one key differ in when and where they were measured."""
    return row.suite, row.step, row.provider, row.mode, row.dtype, tuple(sorted(row.shape.items()))


def peak(row: Row) -> int | None:
    """Of tensors, wherever they were."""
    return row.peak_device_bytes if row.peak_live_bytes is None else row.peak_live_bytes


def mebibytes(size: float | None) -> str:
    """For a table; a dash where nothing was measured."""
    return "-" if size is None else f"{size / 2**20:.2f}"
