"""The table of a preset: on the terminal, and as Markdown between the marks of a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from gradmem.errors import DataError
from gradmem.files import replacing
from gradmem.reproduce.cells import Preset
from gradmem.reproduce.rows import Row

__all__ = ["markdown", "replace_generated", "table"]

HEADER = ("writer", "K", "pairs", "exact match, %", "paper, %", "seeds", "steps", "seconds", "target")
_NAMES = {"gradient": "GradMem", "first": "GradMem, first order", "none": "GradMem, order none",
          "forward": "forward pass (RMT)", "context": "full context, no memory"}
_BEGIN, _END = "<!-- {} begin: made by gradmem reproduce kv --markdown -->", "<!-- {} end -->"


def lines(preset: Preset, rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each writer, K and number of pairs: ranges are over the seeds."""
    newest = {row.cell: row for row in rows if row.preset == preset.name}
    out = []
    for method, steps in preset.methods:
        for pairs in preset.pairs:
            found = [row for cell, row in newest.items()
                     if (cell.method, cell.steps, cell.pairs) == (method, steps, pairs)]
            paper = preset.paper.get((method, steps, pairs))
            name = "not written" if (method, steps) == ("gradient", 0) else _NAMES[method]
            out.append((name, str(steps), str(pairs), *_measured(found, paper)))
    return out


def _measured(rows: Sequence[Row], paper: float | None) -> tuple[str, ...]:
    theirs = "" if paper is None else f"{paper:.1f}"
    if not rows:
        return "not run yet", theirs, "", "", "", ""
    mean = 100 * statistics.fmean(row.exact_match for row in rows)
    spread = _range([100 * row.exact_match for row in rows], ".1f")
    reached = sum(row.reached for row in rows)
    return (f"{mean:.1f}" + (f" ({spread})" if len(rows) > 1 else ""), theirs, str(len(rows)),
            _range([row.trained_steps for row in rows], "d"), _range([row.seconds for row in rows], ".0f"),
            f"{100 * rows[0].target:.2f}: " + ("reached" if reached == len(rows) else
                                               f"{reached} of {len(rows)}" if reached else "not reached"))


def _range(values: Sequence[float], form: str) -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def table(preset: Preset, rows: Sequence[Row]) -> Table:
    """For the terminal."""
    out = Table(title=f"key-value retrieval, preset {preset.name}")
    for column in HEADER:
        out.add_column(column, justify="left" if column in ("writer", "target") else "right")
    for line in lines(preset, rows):
        out.add_row(*line)
    return out


def markdown(preset: Preset, rows: Sequence[Row]) -> str:
    """The table, and where its numbers come from."""
    out = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    out += ["| " + " | ".join(line) + " |" for line in lines(preset, rows)]
    made = sorted({(w.device, w.threads, w.torch, w.python, (w.commit or "unknown")[:7] + ("+" * w.modified),
                    w.date[:10]) for w in (row.provenance for row in rows if row.preset == preset.name)})
    out += ["", *(f"{device}, {threads} thread{'s' * (threads != 1)}, torch {torch}, Python {python}, "
                  f"commit {commit}, {date}."
                  for device, threads, torch, python, commit, date in made)]
    return "\n".join(out).rstrip() + "\n"


def replace_generated(page: Path, preset: Preset, rows: Sequence[Row]) -> None:
    """Puts :func:`markdown` between the marks of the preset in ``page``.

    Raises:
        DataError: if it has no such marks.
    """
    begin, end = (mark.format(f"reproduce-kv {preset.name}") for mark in (_BEGIN, _END))
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise DataError(f"{page}: expected the lines {begin!r} and {end!r}, got none")
    with replacing(page) as temporary:
        temporary.write_text(f"{before}{begin}\n\n{markdown(preset, rows)}\n{end}{after}", encoding="utf-8")
