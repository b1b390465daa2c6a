"""Two processes, replicated or sharded, compute what one does: losses, gradients, steps, runs, checkpoints."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gradmem import (
    CausalLM,
    Checkpoint,
    CheckpointError,
    Experiment,
    GradMem,
    GradMemConfig,
    LMConfig,
    Trainer,
    parallel,
)
from gradmem.checkpoint import TrainState
from gradmem.metrics import read_metrics
from gradmem.ranks import Ranks, whole
from gradmem.training import CHECKPOINT, METRICS
from gradmem_kernels import ArgumentError

VOCAB, WORLD = 20, 2
Results = dict[str, Any]


def _join(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD,
                            timeout=timedelta(seconds=60))


@pytest.fixture(scope="module")
def on_both() -> Iterator[Callable[..., list[Any]]]:
    """Calls a function of this module in two processes that know each other; returns both results."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, context, _join, (rank, port)) for rank in range(WORLD)]

    def call(function: Callable[..., Any], *args: Any) -> list[Any]:
        return [future.result(timeout=100) for future in [pool.submit(function, *args) for pool in pools]]

    yield call
    for pool in pools:
        pool.shutdown()


def _model(**options: Any) -> GradMem:
    torch.manual_seed(0)
    lm = LMConfig(vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=24,
                  tie_embeddings=options.pop("tie_embeddings", False))
    options = {"memory_tokens": 3, "steps": 2, "inner_lr": 2.0, "memory_init_std": 0.5, **options}
    model = GradMem(CausalLM(lm, dtype=torch.float64), GradMemConfig(**options))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def _inputs() -> tuple[torch.Tensor, ...]:
    """Five contexts with unlike lengths; four labels in the part of the first process, one in that of the second."""
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randint(VOCAB, (5, 7), generator=generator)
    queries = torch.randint(VOCAB, (5, 2, 4), generator=generator)
    labels = torch.full_like(queries, -100)
    for i, query, at in ((0, 0, 1), (0, 1, 3), (1, 0, 2), (2, 1, 1), (4, 0, 3)):
        labels[i, query, at] = queries[i, query, at]
    return contexts, queries, labels, torch.tensor([7, 3, 5, 6, 2])


def _step(model: GradMem, call: Any, inputs: tuple[torch.Tensor, ...]) -> Results:
    """Two steps of AdamW; what they saw and left."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen: Results = {}
    for number in range(2):
        out = call(*inputs)
        out.loss.backward()
        if number == 0:
            seen = {"loss": out.loss.detach(), "memory": out.memory.detach(), "inner": out.inner_losses.detach(),
                    **{f"grad {n}": whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}}
        optimizer.step()
        optimizer.zero_grad()
    return seen | {f"weight {name}": whole(p).detach() for name, p in model.named_parameters()}


def _part(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(t.tensor_split(WORLD)[dist.get_rank()] for t in inputs)


def _transformers(forward: str) -> GradMem:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=32, tie_word_embeddings=True)).double()
    config = GradMemConfig(memory_tokens=3, steps=2, inner_lr=2.0, memory_init_std=0.5)
    return GradMem.from_pretrained_backbone(llama, config, forward=forward)


def _parallel(kind: str, options: Results) -> Results:
    model = _transformers(options["forward"]) if "forward" in options else _model(**options)
    if kind == "ddp":
        return _step(model, parallel.replicate(model), _part(_inputs()))
    parallel.shard(model)
    return _step(model, model, _part(_inputs()))


def _assert_same(parts: list[Results], one: Results) -> None:
    for part in parts:
        assert part.keys() == one.keys()
        for name, expected in one.items():
            if name not in ("memory", "inner"):
                torch.testing.assert_close(part[name], expected, rtol=1e-9, atol=1e-12,
                                           msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(torch.cat([part["memory"] for part in parts]), one["memory"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([part["inner"] for part in parts], 1), one["inner"], rtol=1e-9, atol=1e-12)


OPTIONS = {
    "none": {"recompute": "none"},
    "step": {"recompute": "step"},
    "layer": {"recompute": "layer"},
    "everything": {"recompute": "step", "write_head": True, "control_tokens": 1, "memory_projection": "shared",
                   "learn_inner_lr": "step", "inner_loss_weight": 0.3, "tie_embeddings": True, "inner_clip_norm": 0.5},
    "order none": {"order": "none", "steps": 1, "write_head": True},  # parameters without a gradient
}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_gradients_and_steps_are_those_of_one_process(on_both: Callable[..., list[Any]], kind: str,
                                                             options: Results) -> None:
    model = _model(**options)
    _assert_same(on_both(_parallel, kind, options), _step(model, model, _inputs()))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("forward", ["own", "fused"])
def test_models_of_transformers(on_both: Callable[..., list[Any]], kind: str, forward: str) -> None:
    model = _transformers(forward)
    _assert_same(on_both(_parallel, kind, {"forward": forward}), _step(model, model, _inputs()))


def _one_without_labels(kind: str) -> torch.Tensor:
    model = _model()
    call: Any = parallel.replicate(model) if kind == "ddp" else model
    if kind == "fsdp":
        parallel.shard(model)
    contexts, queries, labels, lengths = _part(_inputs())
    if dist.get_rank():
        labels = torch.full_like(labels, -100)
    call(contexts, queries, labels, lengths).loss.backward()
    return whole(model.memory_init.grad)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_part_without_labels(on_both: Callable[..., list[Any]], kind: str) -> None:
    model, (contexts, queries, labels, lengths) = _model(), _inputs()
    labels[3:] = -100
    model(contexts, queries, labels, lengths).loss.backward()
    for grad in on_both(_one_without_labels, kind):
        torch.testing.assert_close(grad, model.memory_init.grad, rtol=1e-9, atol=1e-12)


def _between_steps() -> Results:
    """What a process holds, and what it writes and reads before and after a step."""
    model, (contexts, queries, labels, lengths) = _model(), _inputs()
    parallel.shard(model)
    seen: Results = {"held": sum(p.to_local().numel() for p in model.parameters())}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for moment in ("before", "after"):
        with parallel.gathered(model):
            assert model._fingerprint is None  # addresses and versions may be those of other values
            memory = model.write(contexts, context_lengths=lengths)
            seen[moment] = model.fingerprint(), memory.tensor.detach(), model.read(memory, queries).detach()
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
        with torch.no_grad():  # frees what it gathered
            model(contexts, queries, labels, lengths)
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
        if moment == "before":
            model(*_part((contexts, queries, labels, lengths))).loss.backward()
            assert all(hasattr(p, "full_tensor") and hasattr(p.grad, "full_tensor") for p in model.parameters())
            optimizer.step()
    return seen | {"weights": {name: whole(p).detach() for name, p in model.named_parameters()}}


def test_a_sharded_model_is_held_in_parts_and_writes_whole(on_both: Callable[..., list[Any]]) -> None:
    model, (contexts, queries, _, lengths) = _model(), _inputs()
    first, second = on_both(_between_steps)
    size = sum(p.numel() for p in model.parameters())
    assert first["held"] + second["held"] == size
    assert first["held"] < 0.6 * size
    for moment in ("before", "after"):
        memory = model.write(contexts, context_lengths=lengths)
        for fingerprint, tensor, logits in (first[moment], second[moment]):
            assert fingerprint == model.fingerprint()
            assert torch.equal(tensor, memory.tensor)
            assert torch.equal(logits, model.read(memory, queries))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(first["weights"][name])


def _in_two_passes(kind: str) -> torch.Tensor:
    """Of the whole batch twice, behind a call that is refused."""
    model, part = _model(inner_loss_weight=0.2), _part(_inputs())
    call: Any = parallel.replicate(model) if kind == "ddp" else model
    if kind == "fsdp":
        parallel.shard(model)
    with pytest.raises(ArgumentError):
        call(part[0] + VOCAB, *part[1:])
    for _ in range(2):
        call(*part).loss.backward()
    return whole(model.memory_init.grad)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_add_up_and_a_refused_call_changes_nothing(on_both: Callable[..., list[Any]], kind: str) -> None:
    model = _model(inner_loss_weight=0.2)
    model(*_inputs()).loss.backward()
    for grad in on_both(_in_two_passes, kind):
        torch.testing.assert_close(grad, 2 * model.memory_init.grad, rtol=1e-9, atol=1e-12)


def test_each_process_has_its_own_device() -> None:
    assert Ranks(3, 8, 1).device("cuda") == "cuda:1"
    assert [Ranks(3, 8, 1).device(name) for name in ("cpu", "cuda:0")] == ["cpu", "cuda:0"]
    assert Ranks().device("cuda") == "cuda"


# checkpoints

def _trained(model: GradMem, call: Any, inputs: tuple[torch.Tensor, ...], path: Path | None) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if path is not None:
        parallel.load(path, model, optimizer)
    call(*inputs).loss.backward()
    optimizer.step()
    return optimizer


def _continued(kind: str, path: Path, to: Path) -> Results:
    model = _model()
    call: Any = parallel.replicate(model) if kind == "ddp" else model
    if kind == "fsdp":
        parallel.shard(model)
    optimizer = _trained(model, call, _part(_inputs()), path)
    parallel.save(to, model, optimizer)
    return {name: whole(p).detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_distributed_checkpoints_go_to_any_number_of_processes(on_both: Callable[..., list[Any]], kind: str,
                                                               tmp_path: Path) -> None:
    straight, one = _model(), _model()
    optimizer = _trained(straight, straight, _inputs(), None)
    for _ in range(2):
        optimizer.zero_grad()
        straight(*_inputs()).loss.backward()
        optimizer.step()
    parallel.save(tmp_path / "one", one, _trained(one, one, _inputs(), None))
    on_both(_continued, kind, tmp_path / "one", tmp_path / "two")
    again = _model(memory_init_std=0.1)
    _trained(again, again, _inputs(), tmp_path / "two")
    for (name, weight), expected in zip(again.named_parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    other = torch.optim.AdamW(again.parameters(), lr=0.5)
    parallel.load(tmp_path / "two", again, other)
    assert other.param_groups[0]["lr"] == 0.01
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        parallel.save(tmp_path / "two", again)
    with pytest.raises(CheckpointError, match=r"got one without .metadata"):
        parallel.load(tmp_path, again)
    with pytest.raises(CheckpointError, match="cannot be loaded into this model"):
        parallel.load(tmp_path / "two", _model(memory_tokens=4))


def test_processes_that_do_not_know_each_other_are_refused() -> None:
    for function in (parallel.replicate, parallel.shard):
        with pytest.raises(ArgumentError, match="expected processes that know each other, got none; start them with"):
            function(_model())


# training

def _run(options: Results, out: Path, stop: int | None, resume: bool) -> tuple[Any, TrainState]:
    torch.set_default_dtype(torch.float64)
    try:
        trainer = (Trainer.resume(out, options) if resume else Trainer(Experiment.from_options(options), out))
        mine = trainer.ranks.rank == trainer.ranks.world - 1  # the signal comes to one process alone

        def interrupt(state: TrainState, _: Results) -> None:
            if mine and state.step == stop:
                os.kill(os.getpid(), signal.SIGINT)

        return trainer.run(interrupt), trainer.state
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_training_and_resuming(on_both: Callable[..., list[Any]], options: Results, tmp_path: Path, kind: str) -> None:
    options |= {"batch_size": 5, "start_pairs": 1, "advance_at": 0.01, "ema": 0.5, "inner_loss_weight": 0.1}
    one, whole_run, parts = tmp_path / "one", tmp_path / "whole", tmp_path / "parts"
    _run(options, one, None, False)
    options |= {"parallel": kind}
    assert [stopped for stopped, _ in on_both(_run, options, whole_run, None, False)] == [None, None]
    _assert_same_run(whole_run, one)

    assert [(stopped, state.step) for stopped, state in on_both(_run, options, parts, 3, False)] == [
        (signal.SIGINT, 3)] * 2
    shutil.copytree(parts, tmp_path / "alone")
    on_both(_run, options, parts, None, True)
    assert (parts / CHECKPOINT).read_bytes() == (whole_run / CHECKPOINT).read_bytes()
    _run({}, tmp_path / "alone", None, True)
    _assert_same_run(tmp_path / "alone", one)


def _assert_same_run(a: Path, b: Path) -> None:
    ours, theirs = Checkpoint.load(a / CHECKPOINT), Checkpoint.load(b / CHECKPOINT)
    assert ours.state == theirs.state
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        torch.testing.assert_close(tensor, theirs.tensors[name], rtol=1e-9, atol=1e-11)
    for mine, other in zip(read_metrics(a / METRICS), read_metrics(b / METRICS), strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"seconds", "elapsed"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-9), name
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))


def test_torchrun_trains_from_the_command_line(options: Results, tmp_path: Path) -> None:
    options |= {"max_steps": 3, "batch_size": 4, "parallel": "fsdp"}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gradmem",
         "train", "kv", "--no-plot", "--out", str(tmp_path / "two"), *flags],
        capture_output=True, text=True, check=False, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 3 of 3") == 1  # the first process alone speaks
    Trainer(Experiment.from_options(options), tmp_path / "one").run()
    two, one = (Checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("two", "one"))
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-3, atol=1e-5)  # float32
    assert len(read_metrics(tmp_path / "two" / METRICS)) == len(read_metrics(tmp_path / "one" / METRICS))


def test_what_several_processes_cannot_do_is_refused(on_both: Callable[..., list[Any]], options: Results,
                                                     tmp_path: Path) -> None:
    for change, message in (({"batch_size": 1}, "batch_size: expected at least the number of processes, 2, got 1"),
                            ({"cuda_graphs": "on"}, "cuda_graphs: expected 'auto' or 'off' with several processes")):
        assert all(message in said for said in on_both(_refused, options | change, tmp_path / "none"))


def _refused(options: Results, out: Path) -> str:
    try:
        Trainer(Experiment.from_options(options), out)
    except ArgumentError as reason:
        return str(reason)
    return ""
