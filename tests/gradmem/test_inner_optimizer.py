"""The rule of the inner steps in a model: its options, learned rates, and that files and the command line keep them.

What it computes is checked in test_model.py, against plain PyTorch."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import flags, refused, run
from test_model import MakeModel, ids

from gradmem import Checkpoint, Experiment, GradMemConfig, Memory, Trainer
from gradmem.baselines import WriterConfig
from gradmem.errors import MemoryFileError
from gradmem.files import load_tensors, save_tensors
from gradmem.training import CHECKPOINT
from gradmem_kernels import UPDATE_RULES, ArgumentError, register_update_rule

ADAM = {"inner_optimizer": "adam", "inner_lr": 0.1, "learn_inner_lr": "step_token", "inner_beta1": 0.8}


@pytest.mark.parametrize(("learned", "shape"), [("step", [2]), ("token", [1, 3, 1]), ("step_token", [2, 1, 3, 1])])
def test_learned_rates_of_a_write(make_model: MakeModel, learned: str, shape: list[int]) -> None:
    model = make_model(learn_inner_lr=learned)
    scale = model.inner_lr_scale.detach()
    assert list(scale.shape) == shape
    assert scale.ndim != 2  # the outer optimizer decays matrices
    each = scale.expand(2, 1, 3, 1).flatten(1) if scale.ndim > 1 else scale.unsqueeze(1)
    for steps in (0, 1, 3):
        rates = model.write(ids(2, 6), steps=steps).provenance[1].inner_lr
        assert len(rates) == steps
        for k, rate in enumerate(rates):  # steps beyond those of the configuration have the last one
            expected = 2.0 * each[min(k, 1)]
            assert rate == pytest.approx(expected[0].item() if learned == "step" else expected.tolist())


@pytest.mark.parametrize(("options", "name"), [
    ({}, "sgd()"),
    ({"inner_clip_norm": 0.5}, "sgd(clip_norm=0.5)"),
    ({"inner_optimizer": "momentum", "inner_momentum": 0.0}, "momentum(momentum=0.0, nesterov=False)"),
    ({"inner_optimizer": "momentum", "inner_nesterov": True}, "momentum(momentum=0.9, nesterov=True)"),
    (ADAM, "adam(beta1=0.8, beta2=0.999, eps=1e-08, eps_root=0.0, weight_decay=0.0)"),
])
def test_provenance_names_the_rule(make_model: MakeModel, options: dict[str, Any], name: str) -> None:
    assert make_model(**options).write(ids(1, 6)).provenance[0].inner_optimizer == name


def test_memory_files_keep_rule_and_rates(make_model: MakeModel, tmp_path: Path) -> None:
    model, path = make_model(**ADAM), tmp_path / "doc.safetensors"
    memory = model.write(ids(2, 6))
    memory.save(path)
    loaded = Memory.load(path, model)
    assert loaded.provenance == memory.provenance
    assert len({*loaded.provenance}) == 2
    tensors, about = load_tensors(path, "memory", 1, MemoryFileError)
    for entry in about["provenance"]:  # as files were before there were other rules
        del entry["inner_optimizer"]
    save_tensors(path, "memory", 1, tensors, about)
    assert Memory.load(path, model).provenance == tuple(
        dataclasses.replace(entry, inner_optimizer="") for entry in memory.provenance)


def test_a_rule_of_ones_own(make_model: MakeModel) -> None:
    def sign(lr: Any, *, beta1: float = 0.0, clip_norm: float | None = None) -> Callable[..., Any]:
        assert (beta1, clip_norm) == (0.5, None)
        return lambda state, grads, k: (state[0] - lr * grads[0].sign(),)

    with pytest.raises(ArgumentError, match="inner_optimizer: expected one of sgd, momentum, adam, got 'sign'"):
        GradMemConfig(inner_optimizer="sign")
    register_update_rule("sign", sign)
    try:
        model = make_model(inner_optimizer="sign", inner_beta1=0.5, inner_lr=0.1, steps=1)
        memory = model.write(ids(2, 6))
        step = memory.tensor - model.memory_init
        torch.testing.assert_close(step.abs(), torch.full_like(step, 0.1))
        assert memory.provenance[0].inner_optimizer == "sign(beta1=0.5)"
        with pytest.raises(ArgumentError, match=r"which takes inner_clip_norm, inner_beta1, got 0\.001"):
            GradMemConfig(inner_optimizer="sign", inner_eps=1e-3)
    finally:
        del UPDATE_RULES["sign"]


@pytest.mark.parametrize("values", [
    {"inner_optimizer": "sg"}, {"inner_momentum": 0.9}, {"inner_nesterov": True, "inner_optimizer": "adam"},
    {"inner_beta1": 0.0, "inner_optimizer": "momentum"}, {"inner_beta2": 1.0, "inner_optimizer": "adam"},
    {"inner_momentum": 1.0, "inner_optimizer": "momentum"}, {"inner_eps": -1.0, "inner_optimizer": "adam"},
    {"learn_inner_lr": "layer"}, {"learn_inner_lr": "token", "steps": 0},
], ids=str)
def test_options_without_a_meaning_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"GradMemConfig: {next(iter(values))}: expected "):
        GradMemConfig(**values)


def test_a_writer_without_steps_has_no_rule() -> None:
    with pytest.raises(ArgumentError, match="inner_optimizer: expected 'sgd' where the writer is 'forward'"):
        WriterConfig("forward").check(GradMemConfig(steps=0, inner_optimizer="adam"))


def test_options_are_checked_by_the_rule_too() -> None:
    with pytest.raises(ArgumentError, match="Adam: eps: expected a number > 0 where eps_root is 0"):
        GradMemConfig(inner_optimizer="adam", inner_eps=0.0)


@pytest.mark.parametrize(("old", "new"), [(True, "step"), (False, "none")])
def test_configurations_from_before_there_were_rates_of_vectors(options: dict[str, Any], tmp_path: Path, old: bool,
                                                                new: str) -> None:
    trainer = Trainer(Experiment.from_options({**options, "learn_inner_lr": new}), tmp_path)
    trainer.run()
    path = tmp_path / CHECKPOINT
    tensors, about = load_tensors(path, "checkpoint", 1, MemoryFileError)
    about["experiment"]["gradmem"] = {name: value for name, value in about["experiment"]["gradmem"].items()
                                      if name != "inner_optimizer" and not name.startswith("inner_beta")}
    about["experiment"]["gradmem"]["learn_inner_lr"] = old
    save_tensors(path, "checkpoint", 1, tensors, about)
    loaded = Checkpoint.load(path)
    assert loaded.experiment == trainer.experiment
    for a, b in zip(loaded.model().parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ArgumentError, match="learn_inner_lr: expected a string, got True"):
        GradMemConfig(learn_inner_lr=True)  # type: ignore[arg-type]


def test_training_with_adam_resumes_and_learns_its_rates(options: dict[str, Any], tmp_path: Path) -> None:
    experiment = Experiment.from_options({**options, **ADAM, "weight_decay": 0.1})
    whole, half = Trainer(experiment, tmp_path / "whole"), Trainer(experiment, tmp_path / "half")
    before = whole.model.inner_lr_scale.detach().clone()
    whole.run()
    assert (whole.model.inner_lr_scale != before).all()
    half.run(lambda state, _: os.kill(os.getpid(), signal.SIGINT) if state.step == 3 else None)
    assert half.state.step == 3
    Trainer.resume(tmp_path / "half", ADAM).run()
    assert (tmp_path / "half" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


def test_on_the_command_line(options: dict[str, Any], tmp_path: Path) -> None:
    chosen = {**options, "inner_optimizer": "momentum", "inner_momentum": 0.5, "learn_inner_lr": "token"}
    result = run("train", "kv", "--out", tmp_path / "a", "--inner-nesterov", *flags(chosen))
    assert result.exit_code == 0, result.output
    config = Checkpoint.load(tmp_path / "a" / CHECKPOINT).experiment.gradmem
    assert (config.inner_optimizer, config.inner_momentum, config.inner_nesterov) == ("momentum", 0.5, True)
    assert config.learn_inner_lr == "token"
    context = tmp_path / "context.txt"
    context.write_text("!0:1!!2:3!|")
    memory = tmp_path / "doc.safetensors"
    assert run("write", tmp_path / "a" / CHECKPOINT, "--context", context, "-o", memory).exit_code == 0
    entry, = Memory.load(memory).provenance
    assert entry.inner_optimizer == "momentum(momentum=0.5, nesterov=True)"
    assert len(entry.inner_lr[0]) == 2
    assert "inner_optimizer: checkpoint 'momentum', now 'adam'" in refused(
        "train", "kv", "--out", tmp_path / "a", "--resume", "--inner-optimizer", "adam")
    assert "inner_eps: expected none where inner_optimizer='sgd'" in refused(
        "train", "kv", "--out", tmp_path / "b", "--inner-eps", 1e-3)
