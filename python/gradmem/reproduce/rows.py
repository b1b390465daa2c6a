"""Rows of results: one line of JSON for each cell that was run to its target or its budget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradmem.errors import DataError
from gradmem.provenance import Provenance
from gradmem.reproduce.cells import Cell

__all__ = ["Row", "append_row", "read_rows"]


@dataclass(frozen=True)
class Row:
    """The end of a cell.

    Attributes:
        suite, preset: which table.
        method, steps, pairs, seed: which cell; ``steps`` is K.
        memory_tokens: vectors of the memory; 0 where the context itself is read.
        exact_match: on ``samples`` held-out contexts, as a fraction.
        loss: of READ there, in nats per label.
        target: exact match on the training batches, as a moving average, at which the cell was to stop.
        reached: whether it was.
        trained_steps, seconds: until it stopped: to the target where it was reached, else to the budget. The seconds
            are those of the training steps alone, all runs of the cell together.
        started_from: name of the cell whose weights it began with.
        options: all of the experiment.
        provenance: of the run that ended it.
    """

    suite: str
    preset: str
    method: str
    steps: int
    pairs: int
    seed: int
    memory_tokens: int
    exact_match: float
    samples: int
    loss: float
    target: float
    reached: bool
    trained_steps: int
    seconds: float
    started_from: str | None
    options: Mapping[str, Any]
    provenance: Provenance

    @property
    def cell(self) -> Cell:
        return Cell(self.method, self.steps, self.pairs, self.seed)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, less a last line that was cut off; none where there is no file.

    Raises:
        DataError: for a line that is no row.
    """
    rows = []
    for number, line in enumerate(_whole_lines(path).splitlines(), 1):
        try:
            values = json.loads(line)
            rows.append(Row(**{**values, "provenance": Provenance(**values["provenance"])}))
        except (ValueError, TypeError, KeyError) as reason:
            raise DataError(f"{path}:{number}: not a row of gradmem reproduce: {reason}") from reason
    return rows


def append_row(path: Path, row: Row) -> None:
    """Adds a row in one write, in the place of a last line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        whole = len(_whole_lines(path).encode())
        if whole < file.tell():  # else nothing is cut, also not what another process has added by now
            file.truncate(whole)
        file.write((json.dumps(asdict(row)) + "\n").encode())


def _whole_lines(path: Path) -> str:
    text = path.read_bytes() if path.exists() else b""
    return text[: text.rfind(b"\n") + 1].decode()
