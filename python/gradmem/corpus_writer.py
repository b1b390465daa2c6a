"""A corpus written into a folder of memories, by any number of processes, resumable at any moment."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gradmem.baselines import ForwardWriter
from gradmem.corpus import FAILURES, MANIFEST, Manifest, MemoryCorpus, Shard, shard_name
from gradmem.corpus_records import Failure, Record, Records, Window
from gradmem.errors import DataError, MemoryFileError
from gradmem.files import remove_leftovers, replacing
from gradmem.inputs import check_count
from gradmem.memory import Memory, context_hash
from gradmem.model import GradMem, weight_bytes
from gradmem.own_forward import OwnForwardLM
from gradmem.ranks import Ranks
from gradmem.tasks import Tokenizer
from gradmem_kernels.checks import ArgumentError, Checker

__all__ = ["write_corpus", "writer_fingerprint"]

#: Of a batch: how many records have a memory now, which have none, and whether all that was so before this run.
OnBatch = Callable[[int, Sequence[Failure], bool], None]


def write_corpus(model: GradMem, corpus: str | Path, folder: str | Path, *, tokenizer: Tokenizer | None = None,
                 batch_size: int = 16, max_tokens: int | None = None, steps: int | None = None,
                 fail_fast: bool = False, retry_failed: bool = False, ranks: Ranks | None = None,
                 on_batch: OnBatch | None = None) -> MemoryCorpus:
    """Writes every record of ``corpus`` into a memory; called again after an interruption it goes on.

    Records are put into batches of like length, the same ones whatever the number of processes. A batch is one file,
    which appears whole or not at all: an interruption loses at most the batch of each process. Processes share nothing
    but the folder. A record that cannot be written is kept as a :class:`gradmem.corpus_records.Failure`, and others
    are not touched by it.

    Args:
        model: writes; in ``eval`` mode.
        corpus: JSON lines; see :class:`gradmem.corpus_records.Records`.
        folder: made if missing. One run at a time.
        tokenizer: of the texts in the corpus.
        batch_size: records in a batch.
        max_tokens: longer contexts are refused; by default, what learned positions of the model leave.
        steps: inner steps; by default those of the configuration.
        fail_fast: stops at the first record that cannot be written.
        retry_failed: tries those again that an earlier run could not write, and leaves the others as they are.
        ranks: which of several processes this is; by default as ``torchrun`` says. Batches go round.
        on_batch: hears of every batch of this process.

    Returns:
        What the folder holds now; ``complete`` where no process has anything left to do.

    Raises:
        DataError: if the corpus cannot be read or changes meanwhile; with ``fail_fast``, of the first failure.
        MemoryFileError: if the folder holds memories of another model, corpus, tokenizer or configuration, or a damaged
            one.
        ArgumentError: for an argument that does not fit.
    """
    check, folder, ranks = Checker("write_corpus"), Path(folder), Ranks.here() if ranks is None else ranks
    steps = model.config.steps if steps is None else steps
    for name, value, minimum in (("batch_size", batch_size, 1), ("steps", steps, 0)):
        check_count(check, name, value, minimum)
    if max_tokens is not None:
        check_count(check, "max_tokens", max_tokens, 1)
    room = _room(model)
    if room is not None:
        max_tokens = room if max_tokens is None else min(room, max_tokens)
    records = Records(corpus, tokenizer, vocab_size=model.vocab_size, batch_size=batch_size, max_tokens=max_tokens)
    _settle(folder, Manifest(model.fingerprint(), writer_fingerprint(model), steps, records.digest, records.lines,
                             batch_size, max_tokens))
    # what was tried least decides: others may have tried theirs again by now
    attempts = MemoryCorpus(folder).attempts + 1 if retry_failed else 1
    for window in records.windows():
        # a window of refused records alone has one shard without memories, which tells that it was read
        for number, batch in enumerate(window.batches or [[]]):
            if (window.number + number) % ranks.world == ranks.rank:
                path = folder / shard_name(window.number, number)
                shard = _load_shard(path, batch) if path.exists() else None
                done = shard is not None and (not shard.failures or shard.attempts >= attempts)
                if shard is None or not done:
                    shard = _write_shard(model, window, number, batch, steps, path, attempts, shard)
                if fail_fast and shard.failures:
                    line, _, reason = shard.failures[0]
                    raise DataError(f"{corpus}:{line}: {reason}")
                if on_batch is not None:
                    on_batch(len(shard.ids), shard.failures, done)
    written = MemoryCorpus(folder, model, attempts=attempts)
    if written.complete:  # whoever ends last finds it so, and those who do not would write less over it
        with replacing(folder / FAILURES) as temporary:
            temporary.write_text("".join(json.dumps(failure._asdict()) + "\n" for failure in written.failures),
                                 encoding="utf-8")
    return written


def writer_fingerprint(model: GradMem) -> str:
    """SHA-256 over all parameters and the configuration: what decides how a context is written."""
    digest = hashlib.sha256(json.dumps([model.config.to_dict(), model.backbone.config.to_dict()],
                                       sort_keys=True).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight_bytes(weight))
    return digest.hexdigest()


def _room(model: GradMem) -> int | None:
    """Context tokens that the learned positions of the fused decoder leave; ``None`` where there are none."""
    if isinstance(model.backbone, OwnForwardLM):
        return None
    positions = model.backbone.decoder.config.learned_positions
    if positions is None:
        return None
    if isinstance(model, ForwardWriter):
        return positions - model.written_rows
    # the last token is predicted and not read
    return positions + 1 - model.write_prefix.length(model.config.memory_tokens)


def _settle(folder: Path, manifest: Manifest) -> None:
    """Begins a folder, or makes sure that what is there is of the same kind.

    Raises:
        MemoryFileError: naming what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    written = any(folder.glob("memories-*"))  # looked for first: another process may begin the folder now
    if not path.exists():
        if written:
            raise MemoryFileError(f"{path}: missing beside memory files; name another folder")
        with replacing(path) as temporary:
            temporary.write_text(manifest.text(), encoding="utf-8")
    before = Manifest.load(folder)
    changed = [f"{field.name}: then {_short(getattr(before, field.name))}, now {_short(getattr(manifest, field.name))}"
               for field in dataclasses.fields(manifest)
               if getattr(before, field.name) != getattr(manifest, field.name)]
    if changed:
        raise MemoryFileError(f"{folder}: holds memories that were made otherwise: {'; '.join(changed)}; name another "
                              f"folder, or go on as before")


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _load_shard(path: Path, batch: list[Record]) -> Shard:
    """A shard of an earlier run.

    Raises:
        MemoryFileError: if a memory is not of what its record is now: then the tokenizer is another one.
    """
    shard, now = Shard.load(path), {record.id: context_hash(record.token_ids) for record in batch}
    for name, context in zip(shard.ids, shard.contexts, strict=True):
        if now.get(name) != context:
            raise MemoryFileError(f"{path}: memory of {name!r}: expected one of the record's token ids, got one of "
                                  f"others; use the tokenizer that the folder was written with, or name another folder")
    return shard


def _write_shard(model: GradMem, window: Window, number: int, batch: list[Record], steps: int, path: Path,
                 attempts: int, before: Shard | None) -> Shard:
    """Writes a batch; of one that was written ``before``, the records that have no memory."""
    rows: dict[str, Memory] = {} if before is None else dict(zip(before.ids, _each(Memory.load(path)), strict=True))
    missing = [record for record in batch if record.id not in rows]
    memories, failures = _write_batch(model, missing, steps)
    failed = {failure.line for failure in failures}
    rows |= zip((record.id for record in missing if record.line not in failed),
                (row for memory in memories for row in _each(memory)), strict=True)
    ids = tuple(record.id for record in batch if record.id in rows)
    memory = Memory.cat([rows[name] for name in ids]) if ids else Memory(torch.empty(0, *model.memory_init.shape), ())
    shard = Shard(ids, tuple(entry.context for entry in memory.provenance),
                  (*(window.failures if number == 0 else ()), *failures), window.lines, max(1, len(window.batches)),
                  attempts)
    remove_leftovers(path)
    memory.save(path, more=shard.about())
    return shard


def _each(memory: Memory) -> list[Memory]:
    return [memory[i] for i in range(len(memory))]


def _write_batch(model: GradMem, batch: list[Record], steps: int) -> tuple[list[Memory], list[Failure]]:
    """The memories of the records that have one, on the CPU, in order; and what became of the others."""
    if not batch:
        return [], []
    try:
        memory = _written(model, batch, steps)
    except (ArgumentError, RuntimeError, MemoryError) as reason:
        if not isinstance(reason, ArgumentError) and not _out_of_memory(reason):
            raise
        if len(batch) == 1:
            return [], [Failure(batch[0].line, batch[0].id, str(reason).partition("\n")[0])]
    else:
        finite = torch.isfinite(memory.tensor).flatten(1).all(1)
        failures = [Failure(record.line, record.id, "its memory is not finite; the inner learning rate may be too "
                                                    "large for it")
                    for record, good in zip(batch, finite.tolist(), strict=True) if not good]
        return [memory[finite]] if len(failures) < len(batch) else [], failures
    memories, failures = [], []
    for record in batch:  # outside the handler, which would keep what did not fit alive
        more, failed = _write_batch(model, [record], steps)
        memories += more
        failures += failed
    return memories, failures


def _out_of_memory(reason: Exception) -> bool:
    """On a GPU, or on the CPU, for which torch has no class of its own."""
    return isinstance(reason, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(reason)


def _written(model: GradMem, batch: list[Record], steps: int) -> Memory:
    lengths = torch.tensor([len(record.token_ids) for record in batch])
    ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
    for row, record in zip(ids, batch, strict=True):
        row[: len(record.token_ids)] = torch.tensor(record.token_ids)
    device = model.memory_init.device
    with torch.inference_mode():
        return model.write(ids.to(device), context_lengths=lengths.to(device), steps=steps).to("cpu")
