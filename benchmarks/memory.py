"""Peak memory of one meta-step over the number of WRITE steps: what a step costs beyond the memory it leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from rich.table import Table

from benchmarks.harness import Options, Provenance, Report, Row, mebibytes, peak, peak_bytes, peak_rss
from benchmarks.meta_step import admit
from benchmarks.meta_step_providers import PROVIDERS, make_step
from benchmarks.shapes import PAPER, QUICK, Shape

__all__ = ["DEVICES", "STEPS", "beyond_memories", "run", "table"]

DEVICES = ("cpu", "cuda")
STEPS = (1, 2, 4, 8, 16)


def run(options: Options) -> Iterator[Report]:
    """Peak memory for each provider and number of steps; a batch of 8, since eager keeps every step's graph."""
    shape = QUICK if options.quick else replace(PAPER, batch=8)
    device, where = options.device, Provenance.here(options.device)
    field = "peak_live_bytes" if where.cuda is None else "peak_device_bytes"
    admitted, refused = admit(PROVIDERS, shape, device=device)
    rows = []
    for provider, (error, eager_error) in admitted.items():
        for steps in STEPS[:3] if options.quick else STEPS:
            sized = replace(shape, steps=steps)
            rows.append(Row(
                suite="memory", step="meta-step", provider=provider.name, mode=provider.mode, dtype="float32",
                shape=asdict(sized), error=error, eager_error=eager_error, provenance=where,
                peak_rss_bytes=peak_rss(make_step, provider, sized) if where.cuda is None else None,
                **{field: peak_bytes(make_step(provider, sized, device=device), device)}))
    yield Report(rows, refused)


def table(rows: Sequence[Row]) -> Table:
    """One line per provider, one column per number of steps."""
    shape = ", ".join(f"{name} {size}" for name, size in rows[0].shape.items() if name != "steps")
    out = Table(title=f"peak memory of a meta-step in MiB, {rows[0].dtype}; {shape}")
    steps = sorted({row.shape["steps"] for row in rows})
    for column in ("provider", "mode", *(f"K={k}" for k in steps), f"bytes a step from K={steps[1]} on, less M_k"):
        out.add_column(column, justify="left" if column in ("provider", "mode") else "right")
    for start in range(0, len(rows), len(steps)):
        line = rows[start : start + len(steps)]
        out.add_row(line[0].provider, line[0].mode, *(mebibytes(peak(row)) for row in line),
                    f"{beyond_memories(line[1], line[-1]):.0f}")
    return out


def beyond_memories(few: Row, many: Row) -> float:
    """Bytes by which the peak grows for each further step, the ``M_k`` of that step not counted."""
    shape = Shape(**many.shape)
    memory = 4 * shape.batch * shape.memory_tokens * shape.width
    return (peak(many) - peak(few)) / (many.shape["steps"] - few.shape["steps"]) - memory
