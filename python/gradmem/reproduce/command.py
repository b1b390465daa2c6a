"""The ``gradmem reproduce`` command."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from gradmem.cli_options import progress
from gradmem.config import Config, option
from gradmem.provenance import Provenance
from gradmem.reproduce.cells import Cell, Preset
from gradmem.reproduce.presets import PRESETS
from gradmem.reproduce.rows import append_row, read_rows
from gradmem.reproduce.run import is_done, run_cell
from gradmem_kernels import ArgumentError

__all__ = ["ReproduceConfig", "reproduce", "select"]


@dataclass(frozen=True)
class ReproduceConfig(Config):
    """How cells are run; which, says the command line beside it."""

    preset: str = option("small", "paper, or small: the same claims at the size of a CPU", choices=tuple(PRESETS))
    device: str = option("cpu", "torch device to run on")
    max_steps: int | None = option(None, "budget of training steps of a cell (default: the preset's)", minimum=1)
    cuda_graphs: str = option("auto", "capture steps into CUDA graphs; auto: on CUDA",
                              choices=("auto", "on", "off"))


def select(preset: Preset, methods: Sequence[str], steps: Sequence[int], pairs: Sequence[int],
           seeds: Sequence[int]) -> list[Cell]:
    """The cells of ``preset`` with these properties, an empty list standing for any, and those that they start from.

    Raises:
        ArgumentError: for a value that no cell of the preset has.
    """
    cells = preset.cells()
    for name, given, has in (("method", methods, [c.method for c in cells]), ("inner-steps", steps,
                             [c.steps for c in cells]), ("pairs", pairs, [c.pairs for c in cells]),
                             ("seed", seeds, [c.seed for c in cells])):
        for value in given:
            if value not in has:
                raise ArgumentError(f"gradmem reproduce kv: {name}: expected one of "
                                    f"{', '.join(map(str, dict.fromkeys(has)))} of preset {preset.name}, got {value}")
    wanted = {c for c in cells if all(not given or value in given for given, value in (
        (methods, c.method), (steps, c.steps), (pairs, c.pairs), (seeds, c.seed)))}
    if not wanted:
        raise ArgumentError(f"gradmem reproduce kv: expected a method and inner-steps of one line of "
                            f"preset {preset.name}, got none that go together")
    for cell in reversed(cells):
        smaller = preset.smaller(cell)
        if cell in wanted and smaller is not None:
            wanted.add(smaller)
    return [cell for cell in cells if cell in wanted]


def reproduce(config: ReproduceConfig, cells: Sequence[Cell], device: torch.device, out: Path, results: Path,
              console: Console) -> signal.Signals | None:
    """Runs those of ``cells`` that have no row in ``results`` yet, and adds their rows; a signal that stops a cell is
    returned."""
    preset, provenance = PRESETS[config.preset], Provenance.here(str(device))
    for number, cell in enumerate(cells, 1):
        experiment = preset.experiment(cell, max_steps=config.max_steps, cuda_graphs=config.cuda_graphs)
        ended = {row.cell: row for row in read_rows(results) if row.preset == preset.name}
        if is_done(ended.get(cell), experiment):
            continue
        console.print(f"{number} of {len(cells)}: {cell.name}", highlight=False)
        with progress(console, experiment.train.max_steps) as on_step:
            row = run_cell(preset, cell, experiment, out, device, provenance, on_step)
        if isinstance(row, signal.Signals):
            return row
        append_row(results, row)
        console.print(f"{cell.name}: exact match {row.exact_match:.4f} after {row.trained_steps} steps, target "
                      f"{'reached' if row.reached else 'not reached'}", highlight=False)
    return None
