"""What the command line does with a whole corpus: writing it, and finding one record's memory again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from gradmem.cli_options import progress_bar
from gradmem.corpus import FAILURES, Manifest, MemoryCorpus
from gradmem.corpus_records import Failure
from gradmem.corpus_writer import OnBatch, write_corpus
from gradmem.errors import DataError
from gradmem.memory import Memory
from gradmem.model import GradMem
from gradmem.ranks import Ranks
from gradmem.tasks import Tokenizer

__all__ = ["find_memory", "run_write_corpus"]


def run_write_corpus(model: GradMem, corpus: Path, folder: Path, tokenizer: Tokenizer, *, batch_size: int,
                     max_tokens: int | None, steps: int | None, fail_fast: bool, retry_failed: bool) -> int:
    """Writes ``corpus`` with a progress bar and a summary by the first process; returns the exit status.

    That is 1 where the corpus is complete and some record failed. A process that ends before others must not return it:
    ``torchrun`` would stop them.
    """
    ranks, console = Ranks.here(), Console()
    with _progress(console, folder, ranks) as on_batch:
        written = write_corpus(model, corpus, folder, tokenizer=tokenizer, batch_size=batch_size, max_tokens=max_tokens,
                               steps=steps, fail_fast=fail_fast, retry_failed=retry_failed, ranks=ranks,
                               on_batch=on_batch)
    if ranks.rank == 0 or written.complete:
        failed = f", {len(written.failures)} failed" if written.failures else ""
        see = f": see {folder / FAILURES}" if written.failures else ""
        console.print(f"{folder}: {len(written)} memories{failed}"
                      f"{see if written.complete else '; other processes are still writing'}", highlight=False,
                      markup=False, soft_wrap=True)
    return 1 if written.complete and written.failures else 0


@contextlib.contextmanager
def _progress(console: Console, folder: Path, ranks: Ranks) -> Iterator[OnBatch | None]:
    """A bar over this process's part on a terminal, a line now and then elsewhere, by the first process."""
    if ranks.rank:
        yield None
        return
    seen, failed = 0, 0
    total: int | None = None

    def count(memories: int, failures: Sequence[Failure]) -> int:
        nonlocal seen, failed, total
        if total is None:
            total = math.ceil(Manifest.load(folder).lines / ranks.world)
        seen, failed = seen + memories + len(failures), failed + len(failures)
        return total

    if not console.is_terminal:
        shown = 0.0

        def print_line(memories: int, failures: Sequence[Failure], done: bool) -> None:
            nonlocal shown
            total = count(memories, failures)
            if seen >= shown + total / 50 and not done:
                shown = seen
                console.print(f"{seen} of about {total} records, {failed} failed", highlight=False)

        yield print_line
        return

    with progress_bar(console) as bar:
        task = bar.add_task("writing", total=None)

        def advance(memories: int, failures: Sequence[Failure], _: bool) -> None:
            total = count(memories, failures)
            bar.update(task, completed=seen, total=max(total, seen), description=f"writing  {failed} failed")

        yield advance


def find_memory(path: Path, record: str | None, model: GradMem) -> Memory:
    """The one memory of the file ``path``, or of ``record`` in the folder ``path``.

    Raises:
        DataError: if a file holds several, or a record is named for a file, or none for a folder.
        MemoryFileError: if it cannot be read or is not there.
    """
    if path.is_dir():
        if record is None:
            raise DataError(f"--id: expected the id of a record in {path}, got none")
        return MemoryCorpus(path, model)[record]
    if record is not None:
        raise DataError(f"--id: expected none with a memory file, got {record!r}; {path} is no folder")
    written = Memory.load(path, model)
    if len(written) != 1:
        raise DataError(f"{path}: expected one memory, got {len(written)}; split it with gradmem.Memory")
    return written
