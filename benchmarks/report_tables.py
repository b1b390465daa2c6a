"""Tables of docs/performance.md and of the README, from stored rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.rows import OTHERS, PAPER_CODE, Row, key, peak

__all__ = ["NOT_MEASURED", "attention", "memory", "meta_step", "meta_step_summary", "modes", "newest",
           "price", "provenance", "rates", "same_shape"]

NOT_MEASURED = "not measured yet"
#: Sizes that do not tell two shapes apart in rows of one suite, because older rows do not have them.
LATER = ("kv_heads", "tied")

Lines = list[str]


def newest(rows: Iterable[Row], *, cuda: bool, steps: Sequence[str] | None = None) -> list[Row]:
    """Of each part and shape, the rows of the run that is newest on this kind of device, K aside: what a table compares
    is of one commit and one machine."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if (row.provenance.cuda is not None) == cuda and (steps is None or row.step in steps):
            groups.setdefault((row.step, row.dtype, same_shape(row, "steps")), []).append(row)
    found = []
    for group in groups.values():
        last = max(group, key=lambda row: row.provenance.date)
        of_run = [row for row in group if _run(row) == _run(last)]
        found += {key(row): row for row in of_run}.values()
    return found


def same_shape(row: Row, *but: str) -> tuple[tuple[str, int], ...]:
    return tuple((name, size) for name, size in row.shape.items() if name not in (*but, *LATER))


def provenance(rows: Sequence[Row], command: str) -> str:
    """The sentence that stands below a table: where its numbers come from, and how to have them again."""
    runs = dict.fromkeys(_where(row) for row in rows)
    if any(row.provider == PAPER_CODE for row in rows):
        command += " --peer-path DIR"
    return f"Measured with `{command}`: {'; '.join(runs)}."


def _where(row: Row) -> str:
    p = row.provenance
    parts = [p.device if p.cuda else f"{p.device}, {p.threads} thread{'s' * (p.threads != 1)}",
             f"torch {p.torch}", f"Triton {p.triton or 'none'}", f"Python {p.python}",
             *([f"driver {p.driver}, CUDA {p.cuda}"] if p.cuda else [p.allocator or "allocator not recorded"]),
             f"commit {(p.commit or 'unknown')[:7]}{' with changes' if p.modified else ''}", p.date[:10]]
    return ", ".join(parts)


def _run(row: Row) -> tuple[Any, ...]:
    p = row.provenance
    return p.device, p.torch, p.commit, p.threads


def meta_step(rows: Sequence[Row]) -> Lines:
    """Time and memory of every provider, beside plain PyTorch's."""
    return _table(["", "ms", "20-80 %", "of eager", "peak MiB", "of eager", "RSS MiB", "faults", "GFLOP/s",
                   "of the ceiling", "steps/s"],
                  [[_who(row), _ms(row.median_ms), _spread(row), _ratio(row.ratio_to_eager), _mib(peak(row)),
                    _of_eager(row, rows), _mib(row.peak_rss_bytes), _count(row.minor_faults), _gigaflops(row),
                    _percent(row.roofline), _rate(1e3 / row.median_ms if row.median_ms else None)] for row in rows])


def meta_step_summary(rows: Sequence[Row]) -> Lines:
    """Of these, what the README shows."""
    return _table(["", "time, ms", "of eager", "peak live tensors, MiB", "of eager"],
                  [[_who(row), _ms(row.median_ms), _ratio(row.ratio_to_eager), _mib(peak(row)), _of_eager(row, rows)]
                   for row in rows])


def memory(rows: Sequence[Row]) -> Lines:
    """A line for each provider, a column for each K (and S, where there are several)."""
    shapes = sorted({(row.shape["context_tokens"], row.shape["steps"]) for row in rows})
    several = len({s for s, _ in shapes}) > 1
    lines = []
    for who in dict.fromkeys(map(_who, rows)):
        of = {(row.shape["context_tokens"], row.shape["steps"]): row for row in rows if _who(row) == who}
        lines.append([who, *(_mib(peak(of[shape])) if shape in of else "-" for shape in shapes)])
    return _table(["peak, MiB", *(f"S={s} K={k}" if several else f"K={k}" for s, k in shapes)], lines)


def price(rows: Sequence[Row]) -> Lines:
    """Second order over first order on the same tokens."""
    return _table(["", "shape", "price", "over"],
                  [[_who(row), _shape(row), _ratio(row.price), row.price_of or "-"] for row in rows
                   if row.price is not None])


def rates(rows: Sequence[Row]) -> Lines:
    """Steps and tokens a second."""
    return _table(["", "step", "K", "B", "S", "ms", "20-80 %", "of eager", "steps/s", "tokens/s", "peak MiB", "RSS MiB",
                   "faults", "of the ceiling"],
                  [[_who(row), row.step, *(str(row.shape[n]) for n in ("steps", "batch", "context_tokens")),
                    _ms(row.median_ms), _spread(row), _ratio(row.ratio_to_eager), _rate(row.steps_per_second),
                    _rate(row.tokens_per_second), _mib(peak(row)), _mib(row.peak_rss_bytes), _count(row.minor_faults),
                    _percent(row.roofline)] for row in rows])


def attention(rows: Sequence[Row]) -> Lines:
    """Times of one shape, with the rate that they come to and the price of a step."""
    names = list(dict.fromkeys(row.mode for row in rows))
    def cell(row: Row) -> str:
        part = "" if row.roofline is None else f", {_percent(row.roofline)}"
        return f"{_ms(row.median_ms)} ({_gigaflops(row)}{part})"

    return _by_mode(rows, names, cell)


def modes(rows: Sequence[Row]) -> Lines:
    """Times of one shape."""
    return _by_mode(rows, list(dict.fromkeys(row.mode for row in rows)), lambda row: _ms(row.median_ms))


def _by_mode(rows: Sequence[Row], names: Sequence[str], cell: Callable[[Row], str]) -> Lines:
    lines = []
    for provider in dict.fromkeys(row.provider for row in rows if row.median_ms is not None):
        of = {row.mode: row for row in rows if row.provider == provider and row.median_ms is not None}
        lines.append([f"`{provider}`", *(cell(of[name]) if name in of else "-" for name in names)])
    return _table(["", *(name.replace("_", " ") for name in names)], lines)


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Lines:
    """Columns of numbers that no line has are left out."""
    kept = [i for i in range(len(columns)) if i == 0 or any(line[i] != "-" for line in lines)]
    return [f"| {' | '.join(cells[i] for i in kept)} |"
            for cells in (columns, ["---"] * len(columns), *lines)]


def _who(row: Row) -> str:
    if row.provider in OTHERS:
        return OTHERS[row.provider]
    if row.suite == "attention":
        return f"`{row.provider}`"
    own = row.provider == "gradmem" and row.mode in ("none", "step", "layer")
    return f'`recompute="{row.mode}"`' if own else f"`{row.provider}` {row.mode}"


def _of_eager(row: Row, rows: Sequence[Row]) -> str:
    eager = next((peak(other) for other in rows if other.provider == "eager"
                  and other.shape == row.shape and other.step == row.step), None)
    ours = peak(row)
    return _ratio(ours / eager if ours is not None and eager else None)


def _shape(row: Row) -> str:
    names = {"batch": "B", "heads": "H", "length": "S", "head_dim": "d", "context_tokens": "S", "steps": "K"}
    return " ".join(f"{names[name]} {size}" for name, size in row.shape.items() if name in names)


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _ms(value: float | None) -> str:
    return _number(value, lambda ms: f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}")


def _spread(row: Row) -> str:
    return "-" if row.q20_ms is None or row.q80_ms is None else f"{_ms(row.q20_ms)}-{_ms(row.q80_ms)}"


def _ratio(value: float | None) -> str:
    return _number(value, lambda ratio: f"{ratio:.2f}")


def _mib(value: float | None) -> str:
    return _number(value, lambda size: f"{size / 2**20:.0f}" if size >= 2**29 else f"{size / 2**20:.1f}")


def _count(value: float | None) -> str:
    return _number(value, lambda number: f"{number:.0f}")


def _rate(value: float | None) -> str:
    return _number(value, lambda rate: f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}")


def _percent(value: float | None) -> str:
    return _number(value, lambda part: f"{100 * part:.0f} %")


def _gigaflops(row: Row) -> str:
    return _number(row.tflops, lambda tflops: f"{1e3 * tflops:.1f}")
