"""Training: what it learns, and that nothing is lost or changed by interruptions."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gradmem import (
    Checkpoint,
    CheckpointError,
    DataError,
    Experiment,
    GradMem,
    NonFiniteError,
    TrainConfig,
    Trainer,
    evaluate,
)
from gradmem.checkpoint import TrainState
from gradmem.metrics import MetricsLog, plot, read_metrics
from gradmem.training import CHECKPOINT, METRICS, learning_rate
from gradmem_kernels import ArgumentError

Options = dict[str, Any]


def weights(model: GradMem) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_training_learns_and_the_checkpoint_holds_the_model(options: Options, tmp_path: Path) -> None:
    options |= {"pairs": 1, "alphabet_size": 2, "hidden_size": 16, "max_steps": 90, "lr": 1e-2, "batch_size": 16,
                "inner_lr": 4.0, "eval_every": 30, "eval_samples": 64}
    trainer = Trainer(Experiment.from_options(options), tmp_path)
    assert trainer.run() is None
    entries = read_metrics(tmp_path / METRICS)
    losses = [e["loss"] for e in entries if "loss" in e]
    assert len(losses) == 90
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert [e["step"] for e in entries if "held_out_loss" in e] == [30, 60, 90]

    checkpoint = Checkpoint.load(tmp_path / CHECKPOINT)
    assert checkpoint.state.step == 90
    model = checkpoint.model()
    assert_same(weights(model), weights(trainer.model))
    result = evaluate(model, trainer.task, 64)
    assert (result.samples, result.exact_match) == (64, entries[-1]["held_out_exact_match"])
    assert evaluate(model, trainer.task, 64, batch_size=10).loss == pytest.approx(result.loss)

    plot(tmp_path / METRICS, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == [CHECKPOINT, "curves.png", METRICS]


@pytest.mark.parametrize("extra", [
    {},
    {"learn_inner_lr": "step", "write_head": True, "control_tokens": 1, "memory_projection": "shared",
     "weight_decay": 0.1, "tie_embeddings": True, "start_pairs": 1, "advance_at": 0.01, "ema": 0.5, "queries": 2},
    {"order": "none"},  # leaves parameters without gradient and optimizer state
], ids=["plain", "everything", "order none"])
def test_resume_continues_bit_for_bit(options: Options, tmp_path: Path, extra: Options) -> None:
    experiment = Experiment.from_options({**options, **extra})
    whole = Trainer(experiment, tmp_path / "whole")
    whole.run()

    parts = Trainer(experiment, tmp_path / "parts")
    for stop in (2, 3, 6):  # the last one before the evaluation at the end
        assert parts.run(lambda state, _, stop=stop: os.kill(os.getpid(), signal.SIGINT)
                         if state.step == stop else None) == signal.SIGINT
        assert parts.state.step == stop
        parts = Trainer.resume(tmp_path / "parts", {})
    assert parts.run() is None

    assert_same(weights(parts.model), weights(whole.model))
    assert parts.state == whole.state
    assert (tmp_path / "parts" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()
    times = {"seconds": 0, "elapsed": 0}
    assert [e | times for e in read_metrics(tmp_path / "parts" / METRICS)] == [
        e | times for e in read_metrics(tmp_path / "whole" / METRICS)]


def _killed(work: Callable[[], object]) -> None:
    """Runs ``work`` in a process that kills itself in the midst of it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("every", [1, None, 3])
def test_sigkill_loses_what_no_checkpoint_has_and_nothing_is_changed(options: Options, tmp_path: Path,
                                                                     every: int | None) -> None:
    """Within a step, a save and an evaluation, the first and the last ones too."""
    experiment = Experiment.from_options({**options, "save_every": every})
    Trainer(experiment, tmp_path / "whole").run()
    out = tmp_path / "parts"

    def run(name: str, count: int) -> Callable[[], object]:
        def work() -> None:
            trainer = Trainer.resume(out, {}) if (out / CHECKPOINT).exists() else Trainer(experiment, out)
            calls, original = itertools.count(1), getattr(trainer, name)
            setattr(trainer, name, lambda *args: _kill() if next(calls) == count else original(*args))
            trainer.run()

        return work

    def die_in_save() -> None:
        safetensors.torch.save_file = lambda tensors, path, _: (path.write_bytes(b"half"), _kill())
        Trainer.resume(out, {}).run()

    steps = []
    for work in (run("_take_step", 1), run("_take_step", 3), die_in_save, run("_take_step", 4), run("_evaluate", 1)):
        _killed(work)
        steps.append(Checkpoint.load(out / CHECKPOINT).state.step)
    if every == 1:
        assert steps == [0, 2, 2, 5, 6]  # all but the step in flight
    Trainer.resume(out, {}).run()
    assert (out / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()
    times = {"seconds": 0, "elapsed": 0}
    assert [e | times for e in read_metrics(out / METRICS)] == [
        e | times for e in read_metrics(tmp_path / "whole" / METRICS)]
    assert sorted(os.listdir(out)) == [CHECKPOINT, METRICS], "half a checkpoint was left"


def test_checkpoints_take_a_twentieth_of_the_time(options: Options, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    saved: list[int] = []

    def save(path: Path, experiment: Experiment, state: TrainState, *_: Any) -> None:
        saved.append(state.step)
        clock[0] += 1.0

    monkeypatch.setattr(Checkpoint, "save", save)
    trainer = Trainer(Experiment.from_options({**options, "max_steps": 50, "save_every": None}), tmp_path)
    step = trainer._step

    def slow() -> dict[str, Any]:
        clock[0] += 1.0
        return step()

    monkeypatch.setattr(trainer, "_step", slow)
    trainer.run()
    assert saved == [0, 19, 38, 50]

    others = Trainer(Experiment.from_options({**options, "max_steps": 50, "save_every": None}), tmp_path)
    # one of several processes that has nothing to write, and another is in no hurry for the first 30 steps
    monkeypatch.setattr(Checkpoint, "save", lambda _, __, state, *___: saved.append(state.step))
    monkeypatch.setattr(others, "_largest", lambda number: others.state.step < 30 if number is False else number)
    saved.clear()
    others.run()
    assert saved == [0, *range(30, 51), 50]


def test_a_signal_in_the_last_evaluation_is_heard(experiment: Experiment, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(experiment, tmp_path)

    def interrupted(*args: Any) -> Any:
        if trainer.state.step == 6:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr("gradmem.training.evaluate", interrupted)
    assert trainer.run() == signal.SIGTERM
    entries = read_metrics(tmp_path / METRICS)
    assert Trainer.resume(tmp_path, {}).run() is None
    assert read_metrics(tmp_path / METRICS) == entries  # that evaluation is not done again


def test_recompute_is_resolved_once_and_kept(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmem_kernels import recompute

    options |= {"max_steps": 2, "schedule": "constant", "save_every": 1, "recompute": "auto"}
    free = [2**40, 0]
    monkeypatch.setattr(recompute, "free_memory", lambda device: free.pop(0))
    trainer = Trainer(Experiment.from_options(options), tmp_path)
    assert trainer.model.config.recompute == trainer.experiment.gradmem.recompute == "none"
    trainer.run()
    assert Checkpoint.load(tmp_path / CHECKPOINT).experiment.gradmem.recompute == "none"
    resumed = Trainer.resume(tmp_path, options | {"max_steps": 3})
    assert resumed.model.config.recompute == resumed.experiment.gradmem.recompute == "none"
    assert free == [0], "a resumed run asked for free memory again"
    resumed.run()
    with pytest.raises(CheckpointError, match="recompute: checkpoint 'none', now 'step'"):
        Trainer.resume(tmp_path, {"recompute": "step"})
    assert Trainer(Experiment.from_options(options), tmp_path / "scarce").model.config.recompute == "layer"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(experiment: Experiment, tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    trainer = Trainer(experiment, tmp_path)
    assert trainer.run(lambda *_: signal.raise_signal(number)) == number
    assert signal.getsignal(number) is before
    checkpoint = Checkpoint.load(tmp_path / CHECKPOINT)
    assert checkpoint.state.step == 1
    assert_same(weights(checkpoint.model()), weights(trainer.model))


def test_a_second_interrupt_is_not_held_back(experiment: Experiment, tmp_path: Path) -> None:
    def twice(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    # what Python starts with, unless a shell runs it in the background
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Trainer(experiment, tmp_path).run(twice)
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_another_thread(experiment: Experiment, tmp_path: Path) -> None:
    trainer = Trainer(experiment, tmp_path)
    thread = threading.Thread(target=trainer.run)
    thread.start()
    thread.join()
    assert Checkpoint.load(tmp_path / CHECKPOINT).state.step == 6


def test_an_interrupted_save_leaves_the_old_checkpoint(experiment: Experiment, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(experiment, tmp_path)
    trainer.run()
    before = (tmp_path / CHECKPOINT).read_bytes()
    trainer.state.step += 1

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [CHECKPOINT, METRICS]


def test_a_checkpoint_of_another_configuration_is_refused(options: Options, tmp_path: Path) -> None:
    trainer = Trainer(Experiment.from_options(options), tmp_path)
    trainer.run(lambda *_: signal.raise_signal(signal.SIGINT))
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointError) as refusal:
        Trainer.resume(tmp_path, {"lr": 0.5, "pairs": 1, "batch_size": 4, "max_steps": 9})
    message = str(refusal.value)
    for difference in ("lr: checkpoint 0.003, now 0.5", "pairs: checkpoint 2, now 1", "max_steps: checkpoint 6, now 9"):
        assert difference in message
    assert "batch_size" not in message
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert Trainer.resume(tmp_path, {"log_every": 3, "lr": 0.003}).config.log_every == 3


def test_a_constant_schedule_may_go_on(options: Options, tmp_path: Path) -> None:
    Trainer(Experiment.from_options({**options, "schedule": "constant"}), tmp_path).run()
    longer = Trainer.resume(tmp_path, {"max_steps": 8})
    longer.run()
    assert longer.state.step == 8


def test_invalid_checkpoints_are_refused(experiment: Experiment, options: Options, tmp_path: Path) -> None:
    Trainer(experiment, tmp_path).run()
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.load(path)
    path.write_bytes(whole)
    checkpoint = Checkpoint.load(path)
    wider = Experiment.from_options({**options, "hidden_size": 16})
    with pytest.raises(CheckpointError, match=r"memory_init: expected shape \[2, 16\], got \[2, 8\]"):
        dataclasses.replace(checkpoint, experiment=wider).model()
    with_head = Experiment.from_options({**options, "write_head": True})
    with pytest.raises(CheckpointError, match=r"write_head: expected shape .*, got none"):
        dataclasses.replace(checkpoint, experiment=with_head).model()
    path.write_bytes(whole.replace(b'\\"hidden_size\\"', b'\\"hidden_sizf\\"'))
    with pytest.raises(CheckpointError, match="not a valid checkpoint: LMConfig: hidden_sizf"):
        Checkpoint.load(path)


def test_a_loss_that_is_not_finite_stops_with_the_step(options: Options, tmp_path: Path) -> None:
    trainer = Trainer(Experiment.from_options({**options, "save_every": 1}), tmp_path)

    spoilt: list[dict[str, torch.Tensor]] = []

    def spoil(state: Any, _: Any) -> None:
        if state.step == 2:
            with torch.no_grad():
                trainer.model.backbone.lm_head.weight[0, 0] = math.nan
            spoilt.append(weights(trainer.model))

    with pytest.raises(NonFiniteError, match="step 3: the loss is nan"):
        trainer.run(spoil)
    assert Checkpoint.load(tmp_path / CHECKPOINT).state.step == 2
    for name, weight in trainer.model.named_parameters():  # the step that failed changed nothing
        assert torch.equal(weight.nan_to_num(), spoilt[0][name].nan_to_num()), name


def test_the_curriculum_adds_pairs_and_stops_early(options: Options, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    options |= {"pairs": 3, "start_pairs": 1, "ema": 0.5, "advance_at": 0.7, "stop_at": 0.8, "max_steps": 50}
    trainer = Trainer(Experiment.from_options(options), tmp_path)
    monkeypatch.setattr("gradmem.step.exact_match", lambda *_: torch.tensor([True]))
    levels = []
    trainer.run(lambda _, entry: levels.append(entry["level"]))
    assert levels == [1, 1, 2, 2, 3, 3, 3]  # averages 0.5, 0.75 in each level; the last one needs 0.8
    plot(tmp_path / METRICS, tmp_path / "curves.png")


def test_learning_rate() -> None:
    config = TrainConfig(lr=1.0, warmup_steps=9, max_steps=100, final_lr=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 50) == pytest.approx(0.55)
    assert learning_rate(config, 100) == pytest.approx(0.1)
    constant = dataclasses.replace(config, schedule="constant")
    assert [learning_rate(constant, step) for step in (4, 9, 99)] == pytest.approx([0.5, 1.0, 1.0])


def test_training_on_files(options: Options, tmp_path: Path) -> None:
    lines = [{"context": f"!{k}:{v}!" * (1 + k) + "|", "query": f"?!{k}:", "target": f"{v}!|"}
             for k in range(4) for v in range(3)]
    for name in ("train", "test"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
    options |= {"data": str(tmp_path / "train"), "eval_data": str(tmp_path / "test")}
    trainer = Trainer(Experiment.from_options(options), tmp_path / "run")
    trainer.run(lambda *_: signal.raise_signal(signal.SIGINT))
    os.rename(tmp_path / "train", tmp_path / "moved")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        Trainer.resume(tmp_path / "run", {})
    resumed = Trainer.resume(tmp_path / "run", {"data": str(tmp_path / "moved")})  # what it holds is the same
    resumed.run()
    assert evaluate(resumed.model, resumed.task, 100).samples == 12
    with pytest.raises(CheckpointError, match=r"data: checkpoint '.*moved', now None"):
        Trainer.resume(tmp_path / "run", {"data": None})
    os.rename(tmp_path / "moved", tmp_path / "train")
    (tmp_path / "train").write_text(json.dumps(lines[0]))
    with pytest.raises(CheckpointError, match="data files have changed"):
        Trainer.resume(tmp_path / "run", {"data": str(tmp_path / "train")})
    with pytest.raises(ArgumentError, match="eval_data: expected a file"):
        Experiment.from_options({**options, "eval_data": None})
    with pytest.raises(DataError, match="cannot be read"):
        Trainer(Experiment.from_options({**options, "data": str(tmp_path / "none")}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("name", "values"), [
    ("queries", {"queries": 3}), ("queries", {"queries": 2, "data": "a", "eval_data": "b"}),
    ("start_pairs", {"start_pairs": 3}), ("start_pairs", {"start_pairs": 1, "data": "a", "eval_data": "b"}),
    ("schedule", {"schedule": "linear"}), ("lr", {"lr": math.inf}),
])
def test_options_that_do_not_fit_are_refused(options: Options, name: str, values: Options) -> None:
    with pytest.raises(ArgumentError, match=rf"TrainConfig: {name}: expected "):
        Experiment.from_options({**options, **values})


def test_metrics_of_a_resumed_run_have_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(path, 2)
    log.append({"step": 3, "new": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "new": True}]
    MetricsLog(path, 0)
    assert read_metrics(path) == []
