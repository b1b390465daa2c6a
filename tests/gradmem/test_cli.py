"""The command line, from training to answers in a new process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from gradmem import Checkpoint, Memory, demo
from gradmem.cli import app
from gradmem.metrics import read_metrics
from gradmem.tasks import KVTask
from gradmem.training import CHECKPOINT, METRICS


def flags(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one line with which a command is refused."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("gradmem: error: ")
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    options = {"alphabet_size": 4, "key_length": 1, "value_length": 1, "pairs": 2, "hidden_size": 8, "num_layers": 1,
               "num_heads": 2, "intermediate_size": 8, "memory_tokens": 2, "batch_size": 4, "max_steps": 5,
               "log_every": 1, "eval_every": 3, "eval_samples": 8}
    result = run("train", "kv", "--out", out, "--learn-inner-lr", "step", *flags(options))
    assert result.exit_code == 0, result.output
    assert "step 5 of 5" in result.output
    return out


def test_train_makes_a_checkpoint_metrics_and_a_plot(trained: Path) -> None:
    assert sorted(os.listdir(trained)) == [CHECKPOINT, "curves.png", METRICS]
    experiment = Checkpoint.load(trained / CHECKPOINT).experiment
    assert experiment.gradmem.learn_inner_lr == "step"
    assert experiment.model.hidden_size == 8
    assert experiment.model.vocab_size == 9


def test_every_option_is_on_the_command_line() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", "kv", "--help"])
    assert result.exit_code == 0
    for flag in ("--alphabet-size", "--filler", "--data", "--memory-projection", "--write-head", "--no-write-head",
                 "--inner-clip-norm", "--num-kv-heads", "--start-pairs", "--resume", "--no-plot"):
        assert flag in result.output, flag
    assert "--vocab-size" not in result.output


def test_resume_and_overwriting(trained: Path) -> None:
    before = (trained / CHECKPOINT).read_bytes()
    assert "exists already" in refused("train", "kv", "--out", trained)
    message = refused("train", "kv", "--out", trained, "--resume", "--pairs", 3, "--inner-lr", 1)
    assert "pairs: checkpoint 2, now 3; inner_lr: checkpoint 0.04, now 1.0" in message
    assert run("train", "kv", "--out", trained, "--resume", "--pairs", 2).exit_code == 0
    assert (trained / CHECKPOINT).read_bytes() == before
    assert "cannot be read: No such file" in refused("train", "kv", "--out", trained / "none", "--resume")
    assert "KVConfig: pairs: expected" in refused("train", "kv", "--out", trained / "new", "--pairs", 0)
    assert "device: expected" in refused("train", "kv", "--out", trained / "new", "--device", "abacus")
    assert not (trained / "new").exists()


def test_eval(trained: Path, tmp_path: Path) -> None:
    result = run("eval", trained / CHECKPOINT, "--samples", 16)
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1:3] for line in result.output.splitlines() if "│" in line]
    assert [row[0].strip() for row in rows] == ["0", "1", "2", "chance"]
    assert rows[-1][1].strip() == "0.2500"
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"context": "!0:1!|", "query": "?!0:", "target": "1!|"}))
    result = run("eval", trained / CHECKPOINT, "--data", data, "--steps", 3)
    assert result.exit_code == 0, result.output
    assert "chance" not in result.output
    data.write_text("oops")
    assert f"{data}:1: not JSON" in refused("eval", trained / CHECKPOINT, "--data", data)
    assert "steps: expected an integer >= 0" in refused("eval", trained / CHECKPOINT, "--steps", -1)


def test_write_then_read_in_a_new_process(trained: Path, tmp_path: Path) -> None:
    context, memory = tmp_path / "context.txt", tmp_path / "doc.memory.safetensors"
    context.write_text("!0:1!!2:3!|\n")
    result = run("write", trained / CHECKPOINT, "--context", context, "-o", memory)
    assert result.exit_code == 0, result.output
    command = ["read", str(trained / CHECKPOINT), str(memory), "--query", "?!0:", "--query", "?!"]
    here = run(*command)
    assert here.exit_code == 0, here.output
    assert [line.split("\t")[0] for line in here.output.splitlines()] == ["?!0:", "?!"]
    context.unlink()
    there = subprocess.run([sys.executable, "-m", "gradmem", *command], capture_output=True, text=True, check=True)
    assert there.stdout == here.output
    piped = CliRunner().invoke(app, ["write", str(trained / CHECKPOINT), "--context", "-", "-o", str(memory), "--steps",
                                     "0"], input="!0:1!!2:3!|")
    assert piped.exit_code == 0, piped.output
    assert Memory.load(memory).provenance[0].steps == 0


def test_write_and_read_refuse_what_they_cannot_use(trained: Path, tmp_path: Path) -> None:
    checkpoint, context, memory = trained / CHECKPOINT, tmp_path / "context.txt", tmp_path / "m"
    context.write_text("!0:1!|")
    write = ("write", checkpoint, "--context", context, "-o", memory)
    assert run(*write).exit_code == 0
    before = memory.read_bytes()
    for text, message in (("!9:1!|", "got '9' at position 1"), ("", "expected at least one token")):
        context.write_text(text)
        assert message in refused(*write)
    context.write_bytes(b"\xff\xff")
    assert "not a text file" in refused(*write)
    context.unlink()
    assert "No such file" in refused(*write)
    assert memory.read_bytes() == before

    assert "got 'z' at position 2" in refused("read", checkpoint, memory, "--query", "?!z:")
    memory.write_bytes(before[:-3])
    assert "truncated" in refused("read", checkpoint, memory, "--query", "?!0:")
    assert "expected a memory file" in refused("read", checkpoint, checkpoint, "--query", "?!0:")
    assert "expected a checkpoint file" in refused("eval", _restored(memory, before))
    two = tmp_path / "two"
    Memory.cat([Memory.load(memory)] * 2).save(two)
    assert "expected one memory, got 2" in refused("read", checkpoint, two, "--query", "?!0:")
    assert run("read", checkpoint, memory).exit_code == 2  # no query


def _restored(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_memory_of_another_run_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "context").write_text("!0:1!|")
    assert run("write", trained / CHECKPOINT, "--context", tmp_path / "context", "-o", tmp_path / "m").exit_code == 0
    options = {"alphabet_size": 4, "key_length": 1, "value_length": 1, "pairs": 2, "hidden_size": 8, "num_layers": 1,
               "num_heads": 2, "intermediate_size": 8, "memory_tokens": 2, "max_steps": 1, "seed": 1}
    assert run("train", "kv", "--no-plot", "--out", tmp_path / "other", *flags(options)).exit_code == 0
    assert sorted(os.listdir(tmp_path / "other")) == [CHECKPOINT, METRICS]
    assert "another model" in refused("read", tmp_path / "other" / CHECKPOINT, tmp_path / "m", "--query", "?!0:")


def test_ctrl_c_leaves_a_checkpoint_to_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {"alphabet_size": 4, "key_length": 1, "value_length": 1, "pairs": 2, "hidden_size": 8, "num_layers": 1,
               "num_heads": 2, "intermediate_size": 8, "batch_size": 2, "max_steps": 100000, "schedule": "constant",
               "log_every": 1}
    process = subprocess.Popen([sys.executable, "-m", "gradmem", "train", "kv", "--out", str(out), *flags(options)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ((out / METRICS).exists() and read_metrics(out / METRICS)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped by SIGINT; continue with --resume" in output
    assert errors == ""
    step = Checkpoint.load(out / CHECKPOINT).state.step
    assert run("train", "kv", "--out", out, "--resume", "--max-steps", step + 2).exit_code == 0
    assert Checkpoint.load(out / CHECKPOINT).state.step == step + 2


def test_errors_have_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-m", "gradmem", "eval", str(tmp_path / "none")], capture_output=True,
                             text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == f"gradmem: error: {tmp_path / 'none'}: cannot be read: No such file or directory\n"


def test_a_missing_extra_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in (("train", "kv", "--out", tmp_path / "run"), ("demo", "--out", tmp_path / "run")):
        assert "pip install 'gradmem-kernels[plot]'" in refused(*command)
    assert not (tmp_path / "run").exists()


def test_demo_with_a_recipe_that_learns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(demo.Recipe(), hidden_size=8, num_layers=1, intermediate_size=8, batch_size=4,
                                 max_steps=2)
    monkeypatch.setattr(demo, "SAMPLES", 32)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    for _ in range(2):  # again over its own files
        assert demo.run_demo(console, tmp_path, 0, recipe) is False
    text = console.export_text()
    task = KVTask(Checkpoint.load(tmp_path / CHECKPOINT).experiment.task, 0)
    context, pairs = task.text(0)
    assert context in text
    assert all(f"?!{key}:" in text for key, _ in pairs)
    assert "below 0.90" in text
    assert {CHECKPOINT, METRICS, "curves.png", "doc.memory.safetensors"} <= set(os.listdir(tmp_path))
