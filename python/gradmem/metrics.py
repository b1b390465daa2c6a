"""Metrics of a run as JSON lines, and their plot."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

from gradmem.errors import MissingExtraError
from gradmem.files import replacing

__all__ = ["MetricsLog", "plot", "read_metrics", "require_matplotlib"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics file, less a last line that was cut off."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


class MetricsLog:
    """Appends entries to a file. A resumed run keeps the entries up to the step it resumes from."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [entry for entry in read_metrics(path) if entry["step"] <= step] if step and path.exists() else []
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        self.path, self._kept = path, kept

    def last(self, name: str) -> dict[str, Any]:
        """The newest entry with ``name`` among those that were kept; empty where there is none."""
        return next((entry for entry in reversed(self._kept) if name in entry), {})

    def append(self, entry: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def require_matplotlib() -> None:
    """
    Raises:
        MissingExtraError: if it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("the plot needs matplotlib, which is not installed: pip install "
                                "'gradmem-kernels[plot]', or go without it by --no-plot")


def plot(metrics: Path, image: Path) -> None:
    """Draws losses and exact match of a metrics file over the steps, as PNG.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    entries = read_metrics(metrics)
    train = [e for e in entries if "loss" in e]
    held_out = [e for e in entries if "held_out_loss" in e]
    figure = Figure(figsize=(7, 6), layout="constrained")
    losses, matches = figure.subplots(2, 1, sharex=True)
    losses.plot([e["step"] for e in train], [e["read_loss"] for e in train], label="READ loss", linewidth=1)
    losses.plot([e["step"] for e in train], [e["inner_loss"] for e in train], label="WRITE loss, last step",
                linewidth=1)
    losses.set_ylabel("nats per token")
    losses.set_ylim(bottom=0)
    matches.plot([e["step"] for e in train], [e["average"] for e in train], label="training batches, moving average",
                 linewidth=1)
    matches.plot([e["step"] for e in held_out], [e["held_out_exact_match"] for e in held_out], "o-",
                 label="held-out contexts")
    for before, after in itertools.pairwise(train):
        if before["level"] != after["level"]:
            matches.axvline(after["step"], color="gray", linewidth=0.8, linestyle=":")
            matches.text(after["step"], 0.02, f" {after['level']} pairs", fontsize=8, color="gray")
    matches.set(xlabel="step", ylabel="exact match", ylim=(0, 1.02))
    for axes in (losses, matches):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    with replacing(image) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
