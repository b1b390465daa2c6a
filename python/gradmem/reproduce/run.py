"""Trains one cell to its target or its budget, from where an earlier run of it was stopped."""

from __future__ import annotations

import datetime
import signal
from dataclasses import replace
from pathlib import Path

import torch

from gradmem.checkpoint import Checkpoint
from gradmem.errors import CheckpointError, DataError
from gradmem.evaluation import evaluate
from gradmem.experiment import Experiment
from gradmem.provenance import Provenance
from gradmem.reproduce.cells import Cell, Preset
from gradmem.reproduce.rows import Row
from gradmem.training import CHECKPOINT, OnStep, Trainer

__all__ = ["SUITE", "is_done", "run_cell"]

SUITE = "reproduce-kv"


#: Options with which a cell is the same one: its budget, and what is settled when it begins.
_FREE = ("max_steps", "recompute")


def is_done(row: Row | None, experiment: Experiment) -> bool:
    """Whether ``row`` is the end of this experiment: it reached its target, or used the budget.

    Raises:
        DataError: if it is one of other options.
    """
    if row is None:
        return False
    mine = experiment.options()
    other = [f"{name}: then {row.options[name]!r}, now {value!r}" for name, value in mine.items()
             if row.options.get(name, value) != value and name not in _FREE and not experiment.train.may_change(name)]
    if other:
        raise DataError(f"{row.cell.name}: its row was made with other options: {'; '.join(other)}; name another "
                        f"--results and --out, or take the row out")
    return row.reached or row.trained_steps >= experiment.train.max_steps


def run_cell(preset: Preset, cell: Cell, experiment: Experiment, out: Path, device: torch.device,
             provenance: Provenance, on_step: OnStep | None = None) -> Row | signal.Signals:
    """Trains in ``out/<preset>/<cell>``, from the checkpoint there, if any: a run that was killed at any moment goes on
    from its last checkpoint, and ends as if it had not been.

    Returns:
        The row, or the signal that stopped it, after which the next call goes on.

    Raises:
        CheckpointError: if the checkpoint there was made with other options, or the cell that this one starts from
            has none.
        NonFiniteError: as :meth:`gradmem.Trainer.run`.
    """
    folder = out / preset.name
    directory, smaller = folder / cell.name, preset.smaller(cell)
    if (directory / CHECKPOINT).exists():
        trainer = Trainer.resume(directory, experiment.options(), device)
    else:
        trainer = Trainer(experiment, directory, device)
        if smaller is not None:
            _weights(folder, smaller, cell).restore(trainer.model)
    stopped = trainer.run(on_step)
    if stopped is not None:
        return stopped
    result = evaluate(trainer.model, trainer.task, preset.samples)
    target = preset.stop_at(cell)
    return Row(
        suite=SUITE, preset=preset.name, method=cell.method, steps=cell.steps, pairs=cell.pairs, seed=cell.seed,
        memory_tokens=0 if cell.method == "context" else experiment.gradmem.memory_tokens,
        exact_match=result.exact_match, samples=result.samples, loss=result.loss, target=target,
        reached=trainer.state.level == trainer.task.levels and trainer.state.average >= target,
        trained_steps=trainer.state.step, seconds=round(trainer.elapsed, 1),
        started_from=None if smaller is None else smaller.name, options=trainer.experiment.options(),
        provenance=replace(provenance, date=datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds")))


def _weights(folder: Path, smaller: Cell, cell: Cell) -> Checkpoint:
    path = folder / smaller.name / CHECKPOINT
    if not path.exists():
        raise CheckpointError(f"{path}: expected the checkpoint that {cell.name} starts from, got none; its row may "
                              f"have come from another --out: run it here with another --results")
    return Checkpoint.load(path)
