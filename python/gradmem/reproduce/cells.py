"""What a table consists of: who writes, with how many steps, how many pairs; and the experiment behind each cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradmem.experiment import Experiment

__all__ = ["METHODS", "Cell", "Preset"]

#: Who writes, and the options that say so.
METHODS: dict[str, dict[str, Any]] = {
    "gradient": {"order": "second"},
    "first": {"order": "first"},
    "none": {"order": "none"},
    "forward": {"writer": "forward"},
    "context": {"writer": "context"},
}
#: An average that is below 100 % by less than this is printed as 100.0 %; targets are met at what they are printed as.
_ROUNDING = 0.05


@dataclass(frozen=True)
class Cell:
    """One training run: ``steps`` is K, 0 for a writer without gradient steps and for a memory that is not written."""

    method: str
    steps: int
    pairs: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-K{self.steps}-N{self.pairs}-seed{self.seed}"


@dataclass(frozen=True)
class Preset:
    """A table.

    Attributes:
        name: as the command line has it.
        options: of every experiment; ``queries`` are at most the pairs.
        gradient: and of those that take inner steps.
        of_method: and of a method's own, by its name.
        inner_lr: by K.
        methods: ``(method, K)``, the lines of the table.
        pairs: N, ascending, its columns.
        seeds: of each cell.
        grown: whether a cell starts from the weights of the one with the next smaller N.
        paper: exact match of the paper, in per cent, by ``(method, K, N)``.
        target: exact match, in per cent, at which a cell stops that the paper has no number for.
        samples: held-out contexts.
    """

    name: str
    options: Mapping[str, Any]
    gradient: Mapping[str, Any]
    inner_lr: Mapping[int, float]
    methods: tuple[tuple[str, int], ...]
    pairs: tuple[int, ...]
    seeds: tuple[int, ...]
    grown: bool
    target: float
    samples: int
    paper: Mapping[tuple[str, int, int], float] = field(default_factory=dict)
    of_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """All cells, in an order in which each comes after the one it starts from."""
        return [Cell(method, steps, pairs, seed) for seed in self.seeds for method, steps in self.methods
                for pairs in self.pairs]

    def smaller(self, cell: Cell) -> Cell | None:
        """The cell from whose weights this one starts."""
        at = self.pairs.index(cell.pairs)
        return Cell(cell.method, cell.steps, self.pairs[at - 1], cell.seed) if self.grown and at else None

    def stop_at(self, cell: Cell) -> float:
        """Exact match, as a fraction, at which the cell has reached its target."""
        percent = self.paper.get((cell.method, cell.steps, cell.pairs), self.target)
        return (percent - _ROUNDING) / 100

    def experiment(self, cell: Cell, *, max_steps: int | None = None, cuda_graphs: str = "auto") -> Experiment:
        """
        Args:
            cell: one of :meth:`cells`.
            max_steps: the budget, if not the preset's.
            cuda_graphs: as for training.
        """
        options = {**self.options, **METHODS[cell.method], "pairs": cell.pairs, "steps": cell.steps,
                   "seed": cell.seed, "stop_at": self.stop_at(cell), "cuda_graphs": cuda_graphs}
        if "queries" in options:
            options["queries"] = min(options["queries"], cell.pairs)
        if cell.steps:
            options |= {**self.gradient, "inner_lr": self.inner_lr[cell.steps]}
        options |= self.of_method.get(cell.method, {})
        if max_steps is not None:
            options["max_steps"] = max_steps
        return Experiment.from_options(options)
