"""``gradmem reproduce``: its cells, that a kill changes nothing of their rows, and the committed table."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gradmem import Checkpoint, DataError, Trainer
from gradmem.cli import app
from gradmem.metrics import read_metrics
from gradmem.provenance import Provenance
from gradmem.reproduce import PRESETS, Cell, Preset, Row, append_row, markdown, read_rows, replace_generated
from gradmem.reproduce import rows as reproduce_rows
from gradmem.reproduce.command import select
from gradmem.reproduce.presets import PAPER, SMALL
from gradmem.reproduce.run import is_done
from gradmem.training import CHECKPOINT, METRICS
from gradmem_kernels import ArgumentError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reproduce-kv.jsonl"

TINY = Preset(
    name="tiny",
    options={"alphabet_size": 4, "key_length": 1, "value_length": 1, "hidden_size": 8, "num_layers": 1, "num_heads": 2,
             "intermediate_size": 8, "memory_tokens": 2, "batch_size": 4, "queries": 2, "schedule": "constant",
             "warmup_steps": 2, "max_steps": 8, "log_every": 1, "eval_every": 100, "save_every": 3},
    gradient={"write_head": True, "inner_loss_weight": 0.5}, inner_lr={1: 1.0, 2: 0.5},
    methods=(("gradient", 1), ("gradient", 0), ("first", 2), ("none", 1), ("forward", 0), ("context", 0)),
    pairs=(1, 2), seeds=(0,), grown=True, target=99.9, samples=8,
    paper={("gradient", 1, 1): 99.7, ("gradient", 1, 2): 96.3})


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "small", TINY)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["reproduce", "kv", *map(str, arguments)])


def comparable(path: Path) -> list[dict[str, Any]]:
    """Rows without what a clock says."""
    return [{**dataclasses.asdict(row), "seconds": 0, "provenance": None} for row in read_rows(path)]


def make_row(method: str, steps: int, pairs: int, seed: int = 0, **values: Any) -> Row:
    where = Provenance("a CPU", 1, "3.11.7", "2.13.0", None, None, "f" * 40, False, "2026-01-02T03:04:05+00:00", {})
    row = Row("reproduce-kv", "tiny", method, steps, pairs, seed, memory_tokens=2, exact_match=0.5, samples=8,
              loss=1.0, target=0.9985, reached=False, trained_steps=8, seconds=3.0, started_from=None, options={},
              provenance=where)
    return dataclasses.replace(row, **values)


def test_every_cell_from_training_to_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- reproduce-kv tiny begin: made by gradmem reproduce kv --markdown -->\nold\n"
                    "<!-- reproduce-kv tiny end -->\nafter\n")
    result = run("--out", tmp_path, "--markdown", page)
    assert result.exit_code == 0, result.output
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row.cell for row in rows] == TINY.cells()
    assert len(rows) == 12
    for row in rows:
        assert row.trained_steps == 8 or row.reached
        assert row.seconds == pytest.approx(
            read_metrics(tmp_path / "tiny" / row.cell.name / METRICS)[-1 - (row.trained_steps % 100 != 0)]["elapsed"],
            abs=0.06)
        assert row.started_from == (None if row.pairs == 1 else row.cell.name.replace("N2", "N1"))
        assert row.memory_tokens == (0 if row.method == "context" else 2)
        assert row.provenance.torch
    text = page.read_text()
    assert text.startswith("before\n<!--")
    assert text.endswith("-->\nafter\n")
    assert "old" not in text
    assert markdown(TINY, rows) in text
    again = run("--out", tmp_path)
    assert "1 of" not in again.output, "cells that have a row were run again"
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_a_larger_budget_continues(tmp_path: Path) -> None:
    one = ["--out", tmp_path, "--method", "forward", "--pairs", 1]
    assert run(*one, "--max-steps", 4).exit_code == 0
    assert run(*one, "--max-steps", 4).exit_code == 0
    assert run(*one).exit_code == 0
    assert run("--out", tmp_path / "whole", *one[2:]).exit_code == 0
    rows = comparable(tmp_path / "rows.jsonl")
    assert [row["trained_steps"] for row in rows] == [4, 8]
    assert rows[1:] == comparable(tmp_path / "whole" / "rows.jsonl")


def _killed(out: Path, kill: Callable[[], None]) -> None:
    """Runs the command in a process that ``kill`` makes die of SIGKILL at some moment."""
    def child() -> None:
        kill()
        run(*ARGUMENTS, "--out", out)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


ARGUMENTS = ["--method", "gradient", "--inner-steps", "1"]


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after_step(cell: str, step: int) -> Callable[[], None]:
    def install() -> None:
        original = Trainer._step

        def dying(self: Trainer) -> dict[str, Any]:
            entry = original(self)
            if (self.directory.name, self.state.step) == (cell, step):
                _die()
            return entry

        Trainer._step = dying  # type: ignore[method-assign]

    return install


def _in(name: str, count: int) -> Callable[[], None]:
    """Before call number ``count`` of a function."""
    def install() -> None:
        patch = pytest.MonkeyPatch()
        owner, _, attribute = name.rpartition(".")
        module = __import__(owner, fromlist=[attribute])
        original, calls = getattr(module, attribute), [0]

        def dying(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == count:
                _die()
            return original(*args, **options)

        patch.setattr(module, attribute, dying)

    return install


def test_kills_change_nothing(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*ARGUMENTS, "--out", whole).exit_code == 0
    first, second = "gradient-K1-N1-seed0", "gradient-K1-N2-seed0"
    for kill in (_after_step(first, 2), _after_step(first, 5), _in("os.replace", 3),
                 _in("gradmem.reproduce.run.evaluate", 1), _after_step(second, 1), _after_step(second, 7),
                 _in("gradmem.reproduce.command.append_row", 1)):
        _killed(parts, kill)
    assert run(*ARGUMENTS, "--out", parts).exit_code == 0
    assert comparable(parts / "rows.jsonl") == comparable(whole / "rows.jsonl")
    for cell in (first, second):
        names = [folder / "tiny" / cell / CHECKPOINT for folder in (whole, parts)]
        assert names[0].read_bytes() == names[1].read_bytes(), cell
        elapsed = [e["elapsed"] for e in read_metrics(parts / "tiny" / cell / METRICS) if "elapsed" in e]
        assert len(elapsed) == 8
        assert elapsed == sorted(elapsed), "the clock began anew"


def test_a_signal_stops_and_the_same_command_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer._step

    def interrupted(self: Trainer) -> dict[str, Any]:
        if self.state.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        result = run(*ARGUMENTS, "--pairs", 1, "--out", tmp_path)
    assert result.exit_code == 128 + signal.SIGTERM
    assert "the same command continues" in result.output
    assert Checkpoint.load(tmp_path / "tiny" / "gradient-K1-N1-seed0" / CHECKPOINT).state.step == 5
    assert run(*ARGUMENTS, "--pairs", 1, "--out", tmp_path).exit_code == 0
    assert [row.trained_steps for row in read_rows(tmp_path / "rows.jsonl")] == [8]


def test_methods_are_what_they_are_called() -> None:
    found = {}
    for method, steps in TINY.methods:
        experiment = TINY.experiment(Cell(method, steps, 2, 0))
        found[method, steps] = (experiment.writer.writer, experiment.gradmem.order, experiment.gradmem.steps,
                                experiment.gradmem.write_head)
    assert found == {
        ("gradient", 1): ("gradient", "second", 1, True), ("gradient", 0): ("gradient", "second", 0, False),
        ("first", 2): ("gradient", "first", 2, True), ("none", 1): ("gradient", "none", 1, True),
        ("forward", 0): ("forward", "second", 0, False), ("context", 0): ("context", "second", 0, False)}
    one, two = (TINY.experiment(Cell("gradient", 1, pairs, 3), cuda_graphs="off") for pairs in (1, 2))
    assert (one.train.queries, two.train.queries, two.train.seed, two.train.cuda_graphs) == (1, 2, 3, "off")
    assert (one.train.stop_at, two.train.stop_at) == pytest.approx((0.9965, 0.9625))
    assert TINY.stop_at(Cell("forward", 0, 2, 0)) == pytest.approx(0.9985)
    assert one.gradmem.inner_lr == 1.0


def test_a_method_has_options_of_its_own() -> None:
    found = {method: SMALL.experiment(Cell(method, steps, 4, 0)) for method, steps in SMALL.methods}
    assert {method: (experiment.train.max_steps, experiment.train.lr) for method, experiment in found.items()} == {
        "gradient": (1000, 3e-3), "first": (1000, 3e-3), "none": (1000, 3e-3), "forward": (6000, 1e-3),
        "context": (6000, 1e-3)}
    assert SMALL.experiment(Cell("forward", 0, 4, 0), max_steps=7).train.max_steps == 7


def test_a_larger_cell_begins_with_the_weights_of_the_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "run", lambda *_: signal.SIGINT)  # nothing is trained
    trained = TINY.experiment(Cell("forward", 0, 1, 0))
    trainer = Trainer(trained, tmp_path / "tiny" / "forward-K0-N1-seed0")
    trainer.model.backbone.embed_tokens.weight.data.fill_(7.0)
    trainer.save()
    append_row(tmp_path / "rows.jsonl", make_row("forward", 0, 1, reached=True))
    seen: list[float] = []

    def look(self: Trainer, _: Any) -> signal.Signals:
        seen.append(self.model.backbone.embed_tokens.weight.mean().item())
        return signal.SIGINT

    monkeypatch.setattr(Trainer, "run", look)
    one = ["--out", tmp_path, "--method", "forward", "--pairs", 2]
    assert run(*one).exit_code == 128 + signal.SIGINT
    assert seen == [7.0]
    (tmp_path / "tiny" / "forward-K0-N1-seed0" / CHECKPOINT).unlink()
    result = run(*one)
    assert result.exit_code == 2
    assert "expected the checkpoint that forward-K0-N2-seed0 starts from, got none" in result.stderr


def test_selection() -> None:
    assert select(TINY, ["gradient"], [1], [2], []) == [Cell("gradient", 1, 1, 0), Cell("gradient", 1, 2, 0)]
    assert select(TINY, [], [], [], []) == TINY.cells()
    assert len(select(PAPER, ["gradient"], [5], [96], [1])) == 5, "a cell comes with all that it grows from"
    for arguments, message in (((["rmt"], [], [], []), "method: expected one of gradient, first, none, forward,"),
                               (([], [7], [], []), "inner-steps: expected one of 1, 0, 2"),
                               (([], [], [3], []), "pairs: expected one of 1, 2 of preset tiny, got 3"),
                               (([], [], [], [9]), "seed: expected one of 0"),
                               ((["context"], [1], [], []), "got none that go together")):
        with pytest.raises(ArgumentError, match=message):
            select(TINY, *arguments)


def test_the_papers_numbers_are_targets_as_they_are_printed() -> None:
    assert [PAPER.paper["gradient", 1, n] for n in PAPER.pairs] == [99.7, 96.3, 86.9, 58.6, 32.6]
    assert [PAPER.paper["gradient", 5, n] for n in PAPER.pairs] == [100.0, 100.0, 99.9, 99.1, 88.4]
    assert PAPER.stop_at(Cell("gradient", 5, 16, 0)) == pytest.approx(0.9995)
    for cell in PAPER.cells():
        experiment = PAPER.experiment(cell)
        assert (experiment.model.num_layers, experiment.model.num_heads, experiment.model.hidden_size) == (4, 4, 128)
        assert (experiment.task.pairs, experiment.train.lr, experiment.gradmem.memory_tokens) == (cell.pairs, 1e-4, 8)
        assert 0.04 <= experiment.gradmem.inner_lr <= 0.12
        assert experiment.train.save_every % experiment.train.log_every == 0, "the clock is read from the metrics"


def test_the_provenance_is_that_of_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have a copy of their own, because they also run beside older revisions of the package."""
    from benchmarks import provenance as other

    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    mine, theirs = (dataclasses.asdict(kind.here()) for kind in (Provenance, other.Provenance))
    assert mine.keys() == theirs.keys()
    assert {**mine, "date": 0} == {**theirs, "date": 0}


def test_rows_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path, one, two = tmp_path / "new" / "rows.jsonl", make_row("none", 1, 1), make_row("none", 1, 2)
    assert read_rows(path) == []
    append_row(path, one)
    with open(path, "a") as file:
        file.write(json.dumps(dataclasses.asdict(two))[:50])
    assert read_rows(path) == [one]
    append_row(path, two)
    assert read_rows(path) == [one, two]
    path.write_text(path.read_text() + '{"suite": 1}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:3: not a row"):
        read_rows(path)


def test_rows_that_several_commands_add_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One adds its row while the other looks where to put its own."""
    path, rows = tmp_path / "rows.jsonl", [make_row("none", 1, 1, seed=seed) for seed in range(3)]
    append_row(path, rows[0])
    original = reproduce_rows._whole_lines

    def looks(file: Path) -> str:
        found = original(file)
        monkeypatch.setattr(reproduce_rows, "_whole_lines", original)
        append_row(file, rows[1])
        return found

    monkeypatch.setattr(reproduce_rows, "_whole_lines", looks)
    append_row(path, rows[2])
    assert read_rows(path) == rows


def test_a_row_of_other_options_ends_no_cell(tmp_path: Path) -> None:
    one = ["--out", tmp_path, "--method", "forward", "--pairs", 1]
    options = TINY.experiment(Cell("forward", 0, 1, 0)).options()
    del options["batch_size"]  # as in a row from before there was such an option
    append_row(tmp_path / "rows.jsonl", make_row("forward", 0, 1, options={**options, "recompute": "none"}))
    assert run(*one).exit_code == 0
    assert not (tmp_path / "tiny").exists(), "it was run again"
    append_row(tmp_path / "rows.jsonl", make_row("forward", 0, 1, options={**options, "lr": 0.5}))
    result = run(*one)
    assert result.exit_code == 2
    assert "forward-K0-N1-seed0: its row was made with other options: lr: then 0.5, now 0.003; name" in result.stderr


def test_a_page_without_marks_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("no marks")
    result = run("--out", tmp_path / "out", "--markdown", tmp_path / "page.md")
    assert result.exit_code == 2
    assert "expected the lines" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_table_says_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    rows = [make_row("gradient", 1, 1, exact_match=0.25), make_row("gradient", 1, 1, exact_match=1.0, reached=True),
            make_row("gradient", 1, 1, seed=1, exact_match=0.5, trained_steps=20), make_row("first", 2, 1),
            make_row("none", 1, 1, preset="other")]
    text = markdown(TINY, rows)
    assert "| GradMem | 1 | 1 | 75.0 (50.0 to 100.0) | 99.7 | 2 | 8 to 20 | 3 | 99.85: 1 of 2 |" in text, text
    assert "| GradMem | 1 | 2 | not run yet | 96.3 |" in text
    assert "| GradMem, first order | 2 | 1 | 50.0 |  | 1 | 8 | 3 | 99.85: not reached |" in text
    assert "| not written | 0 | 1 | not run yet |" in text
    assert "| GradMem, order none | 1 | 1 | not run yet |" in text
    assert text.endswith("a CPU, 1 thread, torch 2.13.0, Python 3.11.7, commit fffffff, 2026-01-02.\n")
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(DataError, match="expected the lines"):
        replace_generated(page, TINY, rows)


@pytest.mark.parametrize("name", ["paper", "small"])
def test_the_committed_page_is_what_the_committed_rows_generate(name: str, monkeypatch: pytest.MonkeyPatch,
                                                                tmp_path: Path) -> None:
    monkeypatch.undo()
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "reproduction.md").read_text())
    rows = read_rows(RESULTS)
    replace_generated(page, PRESETS[name], rows)
    assert page.read_text() == (ROOT / "docs" / "reproduction.md").read_text(), (
        f"gradmem reproduce kv --no-run --preset {name} --results benchmarks/results/reproduce-kv.jsonl --markdown "
        f"docs/reproduction.md makes it anew")
    for row in rows:
        assert not row.provenance.modified
        assert row.provenance.commit
        assert row.cell in PRESETS[row.preset].cells()
        assert is_done(row, PRESETS[row.preset].experiment(row.cell))  # made with the options of today
