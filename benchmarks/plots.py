"""Plots of docs/performance.md, from the same rows as its tables: small SVG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report_tables import newest
from benchmarks.rows import OTHERS, Row, peak

__all__ = ["PLOTS", "draw"]

#: Time of attention's passes that is plotted, and of whom.
MODE, PROVIDERS = "step", ("eager", "gradmem")
Rows = Mapping[str, Sequence[Row]]


def _label(row: Row) -> str:
    return OTHERS.get(row.provider, f"{row.provider} {row.mode}")


def _source(rows: Sequence[Row]) -> str:
    """Devices, versions and commits of what is drawn."""
    found = dict.fromkeys(
        f"{p.device}{'' if p.cuda else f', {p.threads} threads'}, torch {p.torch}, Triton {p.triton}, "
        f"commit {(p.commit or 'unknown')[:7]}" for p in (row.provenance for row in rows))
    return "\n".join(found)


def _bars(ax: Any, rows: Sequence[Row], value: Callable[[Row], float | None]) -> None:
    """A group for each part of the suite, a bar for each provider."""
    parts, who = (list(dict.fromkeys(names)) for names in ([row.step for row in rows], map(_label, rows)))
    width = 0.8 / max(len(who), 1)
    for i, label in enumerate(who):
        found = {row.step: value(row) for row in rows if _label(row) == label}
        heights = [found.get(part) or 0.0 for part in parts]
        bars = ax.bar([x + i * width for x in range(len(parts))], heights, width, label=label)
        ax.bar_label(bars, [f"{height:.3g}" if height else "" for height in heights], fontsize=6)
    ax.set_xticks([x + 0.4 - width / 2 for x in range(len(parts))], parts)


def _lines(ax: Any, rows: Sequence[Row], x: str, value: Callable[[Row], float | None],
           label: Callable[[Row], str]) -> None:
    for name in dict.fromkeys(map(label, rows)):
        points = sorted((row.shape[x], value(row)) for row in rows if label(row) == name and value(row) is not None)
        ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    ax.set_xscale("log", base=2)
    ax.set_xlabel({"steps": "inner steps K", "length": "sequence length S"}[x])


def _meta(rows: Rows, cuda: bool) -> list[Row]:
    return [row for row in newest(rows["meta-step"], cuda=cuda) if row.median_ms is not None]


def _attention(rows: Rows, cuda: bool) -> list[Row]:
    found = [row for row in newest(rows["attention"], cuda=cuda)
             if row.median_ms is not None and row.mode == MODE and row.provider in PROVIDERS]
    batches = {row.shape["batch"] for row in found}
    return [row for row in found if cuda or row.shape["batch"] == min(batches)]


def time(ax: Any, rows: Rows, cuda: bool) -> list[Row]:
    found = [row for row in _meta(rows, cuda) if row.ratio_to_eager is not None]
    _bars(ax, found, lambda row: row.ratio_to_eager)
    ax.set_ylabel("meta-step: time of plain eager's")
    return found


def memory(ax: Any, rows: Rows, cuda: bool) -> list[Row]:
    found = [row for row in newest(rows["meta-step"], cuda=cuda) if peak(row) and row.step != "flat"]
    _bars(ax, found, lambda row: (peak(row) or 0) / 2**20)
    ax.set_yscale("log")
    ax.set_ylabel("meta-step: peak memory, MiB")
    return found


def tflops(ax: Any, rows: Rows, cuda: bool) -> list[Row]:
    found = _attention(rows, cuda)
    _lines(ax, found, "length", lambda row: row.tflops, lambda row: f"{row.provider}, d {row.shape['head_dim']}")
    ax.set_ylabel("attention, forward to dual backward: TFLOP/s")
    return found


def price(ax: Any, rows: Rows, cuda: bool) -> list[Row]:
    found = [row for row in _attention(rows, cuda) if row.price is not None]
    _lines(ax, found, "length", lambda row: row.price, lambda row: f"{row.provider}, d {row.shape['head_dim']}")
    ax.set_ylabel("attention: price of second order")
    return found


def flat(ax: Any, rows: Rows, cuda: bool) -> list[Row]:
    found = [row for row in newest(rows["memory"], cuda=cuda) if peak(row)]
    _lines(ax, found, "steps", lambda row: (peak(row) or 0) / 2**20, _label)
    ax.set_yscale("log")
    ax.set_ylabel("meta-step: peak memory, MiB")
    return found


def steps(ax: Any, rows: Rows, cuda: bool) -> list[Row]:
    found = [row for row in _meta(rows, cuda) if row.shape["batch"] == 64]
    _bars(ax, found, lambda row: 1e3 / row.median_ms if row.median_ms else None)
    ax.set_ylabel("meta-steps a second, small model")
    return found


PLOTS: dict[str, Callable[[Any, Rows, bool], list[Row]]] = {
    "time": time, "memory": memory, "tflops": tflops, "price": price, "flat-in-k": flat, "steps": steps}


def draw(folder: Path, rows: Rows) -> list[Path]:
    """Writes each plot, for each kind of device that has rows for it; those that have none any more are removed."""
    import matplotlib as mpl

    mpl.use("svg")
    # text stays text, and the same rows give the same file
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "gradmem", "font.size": 8, "legend.fontsize": 7})
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in PLOTS.items():
        for device in ("cpu", "cuda"):
            figure, ax = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
            path, found = folder / f"{name}-{device}.svg", plot(ax, rows, device == "cuda")
            if found:
                ax.legend()
                ax.set_title(_source(found), fontsize=6)
                figure.savefig(path, metadata={"Date": None})
                written.append(path)
            pyplot.close(figure)
    for stale in set(folder.glob("*.svg")) - set(written):
        stale.unlink()
    return written
