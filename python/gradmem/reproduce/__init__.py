"""``gradmem reproduce``: the paper's tables, cell by cell, with what GradMem is compared with."""

from gradmem.reproduce.cells import METHODS, Cell, Preset
from gradmem.reproduce.presets import PRESETS
from gradmem.reproduce.rows import Row, append_row, read_rows
from gradmem.reproduce.run import run_cell
from gradmem.reproduce.table import markdown, replace_generated, table

__all__ = ["METHODS", "PRESETS", "Cell", "Preset", "Row", "append_row", "markdown", "read_rows", "replace_generated",
           "run_cell", "table"]
