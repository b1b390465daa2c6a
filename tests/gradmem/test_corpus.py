"""A corpus in a folder of memories: every record once, whatever happens meanwhile and however many write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from gradmem import (
    DataError,
    GradMem,
    GradMemConfig,
    Memory,
    MemoryCorpus,
    MemoryFileError,
    Trainer,
    TransformersLM,
    write_corpus,
)
from gradmem.baselines import ForwardWriter
from gradmem.cli import app
from gradmem.corpus import FAILURES, MANIFEST
from gradmem.experiment import Experiment
from gradmem.ranks import Ranks
from gradmem.tasks import ByteTokenizer, KVTokenizer
from gradmem.training import CHECKPOINT
from gradmem_kernels import ArgumentError

VOCAB = 20


def corpus_file(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def random_records(count: int) -> list[dict[str, Any]]:
    lengths = [1 + (7 * i) % 11 for i in range(count)]
    return [{"id": f"doc-{i}", "context_ids": torch.randint(VOCAB, (n,)).tolist()} for i, n in enumerate(lengths)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_record_has_the_memory_that_it_has_alone(make_model: Callable[..., GradMem], tmp_path: Path) -> None:
    model, records = make_model(), random_records(41)  # three windows, the last batch not full
    heard: list[tuple[int, bool]] = []
    written = write_corpus(model, corpus_file(tmp_path / "c", records), tmp_path / "out", batch_size=1,
                           on_batch=lambda n, failures, done: heard.append((n, done)))
    assert heard == [(1, False)] * 41
    assert written.complete
    assert written.failures == ()
    assert len(written) == 41
    assert sorted(written) == sorted(r["id"] for r in records)
    batches = write_corpus(model, tmp_path / "c", tmp_path / "batches", batch_size=4)
    for record in records:
        alone = model.write(torch.tensor([record["context_ids"]]))
        for folder in (written, batches):
            memory = folder[record["id"]]
            assert memory.provenance == alone.provenance
            torch.testing.assert_close(memory.tensor, alone.tensor.detach(), rtol=1e-10, atol=1e-10)
    assert "doc-3" in written
    assert "doc-41" not in written
    with pytest.raises(MemoryFileError, match="no memory of 'doc-41': the corpus has no such record"):
        written["doc-41"]
    # a shard is a memory file like others
    assert sum(len(Memory.load(path, model)) for path in (tmp_path / "batches").glob("memories-*")) == 41


def test_failures_are_kept_record_by_record(make_model: Callable[..., GradMem], tmp_path: Path) -> None:
    good = {"id": "good", "context_ids": [1, 2, 3]}
    bad = [("{\n", None, "not JSON"), ([1], None, "expected an object, got [1]"),
           ({"id": "a"}, "a", "expected one of context and context_ids, got id"),
           ({"id": "b", "context_ids": []}, "b", "expected at least one token, got none"),
           ({"id": "c", "context_ids": [1] * 9}, "c", "expected at most 8 tokens, got 9"),
           ({"id": "d", "context_ids": [VOCAB]}, "d", f"token ids in 0..{VOCAB - 1}, got {VOCAB}"),
           ({"id": "e", "context_ids": [-1]}, "e", "got -1"), ({"id": "f", "context_ids": [True]}, "f", "integers"),
           (good, "good", "no earlier record has"), ({"id": [], "context_ids": [1]}, None, "id: expected a string"),
           ({"id": "g", "context": "text"}, "g", "no tokenizer"),
           ('{"id": "h", "context_ids": [1' + "0" * 5000 + "]}\n", None, "not JSON")]
    corpus = corpus_file(tmp_path / "c", [good, "\n", *(record for record, _, _ in bad), {"context_ids": [4]}])
    corpus.write_bytes(corpus.read_bytes() + b"\xff\n")
    written = write_corpus(make_model(), corpus, tmp_path / "out", max_tokens=8)
    assert list(written) == ["15", "good"]  # by length; without an id, the line
    assert [(f.line, f.id) for f in written.failures] == [*((i, name) for i, (_, name, _) in enumerate(bad, 3)),
                                                          (16, None)]
    for failure, (_, _, reason) in zip(written.failures, [*bad, (0, 0, "not UTF-8: byte 0xff")], strict=True):
        assert reason in failure.reason
    lines = (tmp_path / "out" / FAILURES).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [f._asdict() for f in written.failures]
    assert written.complete
    with pytest.raises(MemoryFileError, match="no memory of 'c': it failed: context: expected at most 8"):
        written["c"]
    with pytest.raises(DataError, match=r"c:3: not JSON"):
        write_corpus(make_model(), corpus, tmp_path / "fast", max_tokens=8, fail_fast=True)
    corpus_file(corpus, ["oops\n"])
    nothing = write_corpus(make_model(), corpus, tmp_path / "nothing")
    assert nothing.complete
    assert (len(nothing), len(nothing.failures)) == (0, 1)


def test_texts_are_taken_as_editors_and_escapes_make_them(make_model: Callable[..., GradMem], tmp_path: Path) -> None:
    """A mark of the byte order, ends of lines with a carriage return, characters of any script, half a character."""
    corpus, tokenizer = tmp_path / "c\u00e9", ByteTokenizer()
    lines = ['{"id": "\u00fc", "context": "\\u0001\\u0002"}', " ", '{"id": "half", "context": "\\ud800"}',
             '\ufeff{"id": "\\ud800", "context": "\\u0003"}']
    corpus.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    written = write_corpus(make_model(), corpus, tmp_path / "out\u00e9", tokenizer=tokenizer)
    assert sorted(written) == ["\u00fc", "\ud800"]
    (failure,) = written.failures
    assert (failure.line, failure.id) == (3, "half")
    assert "expected whole characters, got half a surrogate pair, '\\ud800', at position 0" in failure.reason


def test_a_memory_that_is_not_finite_fails_alone(make_model: Callable[..., GradMem], tmp_path: Path) -> None:
    model, records = make_model(), random_records(4)
    with torch.no_grad():
        model.backbone.embed_tokens.weight[7] = torch.nan
    for record in records:
        record["context_ids"] = [i if i != 7 else 8 for i in record["context_ids"]]
    records[2]["context_ids"] = [7, 7, 7]
    written = write_corpus(model, corpus_file(tmp_path / "c", records), tmp_path / "out")
    assert sorted(written) == ["doc-0", "doc-1", "doc-3"]
    assert [(f.id, f.reason[:24]) for f in written.failures] == [("doc-2", "its memory is not finite")]


def test_what_a_batch_is_too_large_for_is_written_alone(make_model: Callable[..., GradMem], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    write = model.write

    def small(ids: torch.Tensor, **options: Any) -> Memory:
        if ids.numel() > 8:
            raise torch.OutOfMemoryError("out of memory")
        return write(ids, **options)

    monkeypatch.setattr(model, "write", small)
    records = random_records(6)
    written = write_corpus(model, corpus_file(tmp_path / "c", records), tmp_path / "out")
    fits = {r["id"] for r in records if len(r["context_ids"]) <= 8}
    assert set(written) == fits
    assert {f.id for f in written.failures} == {r["id"] for r in records} - fits
    assert {f.reason for f in written.failures} == {"out of memory"}


@pytest.mark.parametrize(("reason", "said"), [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (MemoryError("no room"), True), (RuntimeError("a fault of ours"), False)])
def test_what_the_cpu_has_no_room_for_fails_alone(make_model: Callable[..., GradMem], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch, reason: Exception,
                                                  said: bool) -> None:
    model = make_model()
    monkeypatch.setattr(model, "write", lambda *_, **__: (_ for _ in ()).throw(reason))
    corpus = corpus_file(tmp_path / "c", random_records(3))
    if said:
        written = write_corpus(model, corpus, tmp_path / "out")
        assert [f.reason for f in written.failures] == [str(reason)] * 3
    else:
        with pytest.raises(RuntimeError, match="a fault of ours"):
            write_corpus(model, corpus, tmp_path / "out")


def too_long_for(model: GradMem, monkeypatch: pytest.MonkeyPatch, longest: int) -> list[list[int]]:
    """Makes ``model`` run out of memory beyond ``longest`` tokens; hears of the lengths that it writes."""
    write, heard = GradMem.write.__get__(model), []

    def small(ids: torch.Tensor, *, context_lengths: torch.Tensor, **options: Any) -> Memory:
        if context_lengths.max() > longest:
            raise torch.OutOfMemoryError("out of memory")
        heard.append(context_lengths.tolist())
        return write(ids, context_lengths=context_lengths, **options)

    monkeypatch.setattr(model, "write", small)
    return heard


def test_what_failed_is_tried_again_when_asked(make_model: Callable[..., GradMem], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = make_model(), tmp_path / "out"
    records = [{"id": n, "context_ids": [1] * n} for n in range(1, 9)]
    corpus = corpus_file(tmp_path / "c", [*records, "oops\n"])
    options: dict[str, Any] = {"batch_size": 2}
    too_long_for(model, monkeypatch, 3)
    first = write_corpus(model, corpus, out, **options)
    assert (sorted(first), first.attempts) == (["1", "2", "3"], 1)
    third_record = first["3"].tensor
    heard = too_long_for(model, monkeypatch, 6)
    assert len(write_corpus(model, corpus, out, **options)) == 3
    assert heard == [], "records were tried again unasked"
    before = files(out)
    second = write_corpus(model, corpus, out, retry_failed=True, **options)
    assert heard == [[4], [5, 6]]  # nothing that has a memory
    assert (sorted(second), second.attempts, second.complete) == (["1", "2", "3", "4", "5", "6"], 2, True)
    assert [f.id for f in second.failures] == ["7", "8", None]
    assert len((out / FAILURES).read_text().splitlines()) == 3
    assert torch.equal(second["3"].tensor, third_record)
    assert [name for name, content in files(out).items() if before[name] == content] == [MANIFEST]
    heard = too_long_for(model, monkeypatch, 9)
    third = write_corpus(model, corpus, out, retry_failed=True, **options)
    assert heard == [[7, 8]]
    assert len(third) == 8
    whole = write_corpus(model, corpus, tmp_path / "whole", **options)
    for name in whole:
        torch.testing.assert_close(third[name].tensor, whole[name].tensor, rtol=1e-10, atol=1e-10)
        assert third[name].provenance == whole[name].provenance


def test_ranks_try_again_what_is_theirs(make_model: Callable[..., GradMem], tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to end leaves the exit status and the list of failures to the last, also where it begins late."""
    model, out = make_model(), tmp_path / "out"
    corpus = corpus_file(tmp_path / "c", [{"id": n, "context_ids": [1] * n} for n in range(1, 9)])
    too_long_for(model, monkeypatch, 0)
    options: dict[str, Any] = {"batch_size": 2}
    assert len(write_corpus(model, corpus, out, **options)) == 0
    old = (out / FAILURES).read_text()
    heard = too_long_for(model, monkeypatch, 5)
    early = write_corpus(model, corpus, out, retry_failed=True, ranks=Ranks(0, 2), **options)
    assert (heard, early.complete) == ([[1, 2], [5]], False)
    assert (out / FAILURES).read_text() == old
    heard.clear()
    late = write_corpus(model, corpus, out, retry_failed=True, ranks=Ranks(1, 2), **options)
    assert (heard, late.complete, late.attempts) == ([[3, 4]], True, 2)
    assert sorted(late) == ["1", "2", "3", "4", "5"]
    assert len((out / FAILURES).read_text().splitlines()) == 3


def test_a_corpus_that_changes_meanwhile_is_refused(make_model: Callable[..., GradMem], tmp_path: Path) -> None:
    """Before anything of the change is written, so that the folder goes on with the corpus as it was."""
    records = [{**record, "note": "x" * 20_000} for record in random_records(40)]  # more than a file's buffer
    corpus, out = corpus_file(tmp_path / "c", records), tmp_path / "out"
    before = corpus.read_text()
    for after in (before.replace('"doc-35"', '"doc-5x"'), before + '{"context_ids": [1]}\n',
                  "".join(before.splitlines(True)[:32])):
        corpus.write_text(before)
        with pytest.raises(DataError, match=r"as it was when this run began, got another from line 33 on"):
            write_corpus(make_model(), corpus, out, batch_size=1,
                         on_batch=lambda *_, after=after: corpus.write_text(after))
        assert len(MemoryCorpus(out)) == 32
    corpus.write_text(before)
    assert write_corpus(make_model(), corpus, out, batch_size=1).complete


def test_another_tokenizer_is_refused(make_model: Callable[..., GradMem], tmp_path: Path) -> None:
    corpus = corpus_file(tmp_path / "c", [{"id": "a", "context": "xyz"}, {"id": "b", "context": "xy"}])
    write_corpus(make_model(), corpus, tmp_path / "out", tokenizer=KVTokenizer("xyz"))
    with pytest.raises(MemoryFileError, match=r"memory of 'b': expected one of the record's token ids, got one of"):
        write_corpus(make_model(), corpus, tmp_path / "out", tokenizer=KVTokenizer("zyx"))
    assert write_corpus(make_model(), corpus, tmp_path / "out", tokenizer=KVTokenizer("xyz")).complete


@pytest.mark.parametrize(("kind", "room"), [
    (GradMem, 16 + 1 - 5),  # the last token is not read
    (ForwardWriter, 16 - 5 - 4)])
def test_contexts_fill_the_learned_positions_and_no_more(tmp_path: Path, kind: type[GradMem], room: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    steps = 2 if kind is GradMem else 0
    model = kind(TransformersLM(gpt2), GradMemConfig(memory_tokens=3, control_tokens=1, steps=steps)).eval()
    corpus = corpus_file(tmp_path / "c", [{"id": n, "context_ids": [1] * n} for n in (room, room + 1)])
    written = write_corpus(model, corpus, tmp_path / "out")
    assert list(written) == [str(room)]
    assert [f.reason for f in written.failures] == [f"context: expected at most {room} tokens, got {room + 1}"]
    with pytest.raises(ArgumentError, match="learned embeddings"):
        model.write(torch.ones(1, room + 1, dtype=torch.int64))


def test_ranks_share_the_work_and_write_the_same_files(make_model: Callable[..., GradMem], tmp_path: Path) -> None:
    corpus = corpus_file(tmp_path / "c", [*random_records(40), "oops\n"])
    options: dict[str, Any] = {"batch_size": 2, "max_tokens": 9}
    written = write_corpus(make_model(), corpus, tmp_path / "one", **options)
    heard: list[list[int]] = [[], []]
    for rank in (0, 1):
        parts = write_corpus(make_model(), corpus, tmp_path / "two", ranks=Ranks(rank, 2), **options,
                             on_batch=lambda n, failures, done, rank=rank: heard[rank].append(n))
        assert parts.complete == (rank == 1)
        assert (tmp_path / "two" / FAILURES).exists() == parts.complete
        if not parts.complete:
            with pytest.raises(MemoryFileError, match="not written yet"):
                parts[next(name for name in written if name not in parts)]
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert abs(len(heard[0]) - len(heard[1])) <= 1


def test_a_folder_of_something_else_is_refused(make_model: Callable[..., GradMem], tmp_path: Path) -> None:
    model, out = make_model(), tmp_path / "out"
    corpus = corpus_file(tmp_path / "c", random_records(5))
    write_corpus(model, corpus, out)
    before = files(out)
    with pytest.raises(MemoryFileError, match="steps: then 2, now 1"):
        write_corpus(model, corpus, out, steps=1)
    with pytest.raises(MemoryFileError, match="batch_size: then 16, now 3"):
        write_corpus(model, corpus, out, batch_size=3)
    with pytest.raises(MemoryFileError, match="model: then"):
        write_corpus(make_model(seed=1), corpus, out)
    with pytest.raises(MemoryFileError, match=f"written by another model.*{make_model(seed=1).fingerprint()[:12]}"):
        MemoryCorpus(out, make_model(seed=1))
    other = make_model()  # differs in what WRITE alone uses
    with torch.no_grad():
        other.memory_init.add_(1)
    assert other.fingerprint() == model.fingerprint()
    with pytest.raises(MemoryFileError, match=r"made otherwise: writer: then"):
        write_corpus(other, corpus, out)
    with pytest.raises(ArgumentError, match="batch_size: expected an integer >= 1, got 0"):
        write_corpus(model, corpus, out, batch_size=0)
    corpus_file(corpus, random_records(6))
    with pytest.raises(MemoryFileError, match=r"corpus: then .* lines: then 5, now 6"):
        write_corpus(model, corpus, out)
    assert files(out) == before
    with pytest.raises(DataError, match="cannot be read: No such file"):
        write_corpus(model, tmp_path / "none", out)
    with pytest.raises(MemoryFileError, match=r"corpus.json: cannot be read"):
        MemoryCorpus(tmp_path)
    shard = next(out.glob("memories-*"))
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(MemoryFileError, match="truncated"):
        MemoryCorpus(out)
    (out / MANIFEST).unlink()
    with pytest.raises(MemoryFileError, match="missing beside memory files"):
        write_corpus(model, corpus, out)


# the command line

def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def checkpoint(options: dict[str, Any], tmp_path: Path) -> Path:
    Trainer(Experiment.from_options(options), tmp_path / "run").save()
    return tmp_path / "run" / CHECKPOINT


def kv_corpus(path: Path, count: int) -> Path:
    return corpus_file(path, [{"id": i, "context": f"!{i % 4}:{(i // 4) % 4}!" * (1 + i % 3) + "|"}
                              for i in range(count)])


def test_the_command_writes_a_corpus_and_reads_a_record(checkpoint: Path, tmp_path: Path) -> None:
    corpus, out = kv_corpus(tmp_path / "c.jsonl", 20), tmp_path / "memories"
    result = run("write", checkpoint, "--input", corpus, "-o", out)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"{out}: 20 memories"
    before = files(out)
    again = run("write", checkpoint, "--input", corpus, "-o", out)
    assert again.exit_code == 0
    assert files(out) == before
    (tmp_path / "context").write_text("!1:1!" * 3 + "|")
    assert run("write", checkpoint, "--context", tmp_path / "context", "-o", tmp_path / "m").exit_code == 0
    alone = run("read", checkpoint, tmp_path / "m", "--query", "?!1:")
    found = run("read", checkpoint, out, "--id", 5, "--query", "?!1:")
    assert found.exit_code == 0, found.output
    assert found.output == alone.output

    with open(corpus, "a") as file:
        file.write('{"id": "x", "context": "!9:1!|"}\n')
    result = run("write", checkpoint, "--input", corpus, "-o", tmp_path / "other")
    assert result.exit_code == 1
    assert f"20 memories, 1 failed: see {tmp_path / 'other' / FAILURES}" in result.output
    assert run("write", checkpoint, "--input", corpus, "-o", tmp_path / "other", "--retry-failed").exit_code == 1
    assert MemoryCorpus(tmp_path / "other").attempts == 2
    for arguments, message in (
            (("write", checkpoint, "-o", out), "expected one of --context and --input, got neither"),
            (("write", checkpoint, "--context", corpus, "-o", out, "--batch-size", 16),
             "--batch-size: expected none with --context, got 16; it is an option of --input"),
            (("write", checkpoint, "--context", corpus, "-o", out, "--retry-failed"), "--retry-failed: expected none"),
            (("write", checkpoint, "--input", corpus, "-o", out), "made otherwise: corpus: then"),
            (("write", checkpoint, "--input", corpus, "-o", tmp_path / "fast", "--fail-fast"), "got '9' at position 1"),
            (("read", checkpoint, out, "--query", "?"), "--id: expected the id of a record"),
            (("read", checkpoint, tmp_path / "m", "--id", 1, "--query", "?"), "--id: expected none with a memory file"),
            (("read", checkpoint, out, "--id", 99, "--query", "?"), "no memory of '99'")):
        result = run(*arguments)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output
        assert message in result.stderr


#: Kills itself in the middle of saving a shard, or of the first batch of all after some.
_KILLED = """
import os, signal, sys
from gradmem import corpus_writer, files
from gradmem.cli import app
moment, count = sys.argv.pop(1), int(sys.argv.pop(1))
left = [count]
def die():
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGINT if moment == "interrupted" else signal.SIGKILL)
if moment == "saving":
    save = files.safetensors.torch.save_file
    def half(tensors, path, metadata):
        save(tensors, path, metadata)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        die()
        save(tensors, path, metadata)
    files.safetensors.torch.save_file = half
else:
    write = corpus_writer._written
    corpus_writer._written = lambda *args: (die(), write(*args))[1]
app()
"""


@pytest.mark.parametrize(("moment", "world"), [("saving", 1), ("writing", 2), ("interrupted", 1)])
def test_killed_and_continued_leaves_the_same_files(checkpoint: Path, tmp_path: Path, moment: str, world: int) -> None:
    """The last of ``world`` processes is killed; one alone goes on."""
    corpus = kv_corpus(tmp_path / "c.jsonl", 40)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["write", str(checkpoint), "--input", str(corpus), "--batch-size", "4", "--output"]
    assert run(*command, whole).exit_code == 0
    killed = subprocess.run([sys.executable, "-c", _KILLED, moment, "3", *command, str(parts)], check=False,
                            capture_output=True, text=True,
                            env={**os.environ, "RANK": str(world - 1), "WORLD_SIZE": str(world)})
    if moment == "interrupted":  # not 1, which failed records have
        assert (killed.returncode, killed.stderr) == (128 + signal.SIGINT, "")
    else:
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    made = {name: (content, (parts / name).stat().st_mtime_ns) for name, content in files(parts).items()
            if name.startswith("memories-")}
    assert len(made) == 3  # the batch in flight is all that was lost
    assert run(*command, parts).exit_code == 0
    assert files(parts) == files(whole)
    assert all((parts / name).stat().st_mtime_ns == time for name, (_, time) in made.items()), "written again"


def test_torchrun_gives_each_process_its_part(checkpoint: Path, tmp_path: Path) -> None:
    corpus = corpus_file(tmp_path / "c.jsonl", [*kv_corpus(tmp_path / "k", 24).read_text().splitlines(True), "oops\n"])
    command = ["write", str(checkpoint), "--input", str(corpus), "--batch-size", "4", "--output"]
    assert run(*command, tmp_path / "one").exit_code == 1
    processes = [subprocess.Popen(
        [sys.executable, "-m", "gradmem", *command, str(tmp_path / "two")], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)]
    for process in processes:
        process.communicate(timeout=60)
    assert {process.returncode for process in processes} <= {0, 1}
    assert 1 in {process.returncode for process in processes}  # of the one that ended last
    assert files(tmp_path / "two") == files(tmp_path / "one")
