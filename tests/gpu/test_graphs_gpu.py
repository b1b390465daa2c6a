"""CUDA graphs of WRITE and of the meta-step on a GPU: the same results as without. Their logic has tests on the CPU,
in tests/gradmem/test_graphs.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradmem import (
    CausalLM,
    Experiment,
    GradMem,
    GradMemConfig,
    GraphedStep,
    GraphedWrite,
    GraphError,
    LMConfig,
    Trainer,
)
from gradmem.graphs import Graphed, Input
from gradmem.step import meta_step
from gradmem.tasks.batch import IGNORE, Batch
from gradmem.training import CHECKPOINT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

VOCAB = 40


def make_model(**options: Any) -> GradMem:
    torch.manual_seed(0)
    lm = LMConfig(vocab_size=VOCAB, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96)
    config = GradMemConfig(**{"memory_tokens": 4, "steps": 2, "inner_lr": 1.0, "memory_init_std": 0.5, **options})
    return GradMem(CausalLM(lm), config).cuda()


def make_batch(seed: int, context: int, query: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids, queries = (torch.randint(VOCAB, shape, generator=g) for shape in ((4, context), (4, 2, query)))
    mask = torch.zeros_like(queries, dtype=torch.bool)
    mask[..., -2:] = True
    lengths = torch.randint(context // 2, context + 1, (4,), generator=g)
    return Batch(ids, lengths, queries, queries.masked_fill(~mask, IGNORE), mask).to("cuda")


def make_optimizer(model: GradMem, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3, device="cuda"), capturable=True, **options)


def assert_near(model: GradMem, other: GradMem, rtol: float) -> None:
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (a - b).norm() <= rtol * b.norm() + 1e-6, name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"learn_inner_lr": "step", "inner_clip_norm": 0.1, "inner_clip_value": 0.1, "inner_loss_weight": 0.3},
    {"recompute": "none"}, {"recompute": "layer"}, {"order": "first"}, {"steps": 0},
    {"inner_optimizer": "momentum", "inner_nesterov": True, "learn_inner_lr": "token", "inner_clip_norm": 0.1},
    {"inner_optimizer": "adam", "inner_lr": 0.1, "inner_eps": 0.01, "learn_inner_lr": "step_token"}], ids=str)
def test_steps_equal_those_without_graphs(options: dict[str, Any], fused: bool) -> None:
    """Padded shapes, so equal up to rounding, which Adam's first steps make larger."""
    plain, graphed = make_model(**options), make_model(**options)
    plain_optimizer, optimizer = make_optimizer(plain, fused=fused), make_optimizer(graphed, fused=fused)
    step = GraphedStep(graphed, optimizer, grad_clip=0.5)
    for i in range(12):
        batch = make_batch(i, *((27, 9), (50, 12), (100, 9))[i % 3])
        for group in (*plain_optimizer.param_groups, *optimizer.param_groups):
            group["lr"].fill_(1e-3 / (i + 1))
        expected, found = meta_step(plain, plain_optimizer, batch, 0.5).numbers(), step(batch).numbers()
        assert found[:2] == pytest.approx(expected[:2], rel=1e-3)
    assert_near(graphed, plain, 1e-2)


def test_a_replay_is_the_captured_step_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On shapes that need no padding, with deterministic kernels, and after warm-up steps or a replay alike."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        plain, graphed = make_model(), make_model()
        plain_optimizer, optimizer = make_optimizer(plain, fused=True), make_optimizer(graphed, fused=True)
        step = GraphedStep(graphed, optimizer)
        for i in range(6):
            batch = make_batch(i, 32, 8)
            assert step(batch).numbers() == meta_step(plain, plain_optimizer, batch).numbers()
        for a, b in zip(graphed.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)


def test_writes_equal_those_without_graphs() -> None:
    model = make_model(learn_inner_lr="step")
    write = GraphedWrite(model)
    for i in range(12):
        batch = make_batch(i, (27, 50, 100)[i % 3], 8)
        lengths = None if i % 2 else batch.context_lengths
        found, expected = (run(batch.context_ids, context_lengths=lengths) for run in (write, model.write))
        assert torch.allclose(found.tensor, expected.tensor, rtol=1e-3, atol=1e-4)
        assert found.provenance == expected.provenance
    assert len(write.graphed) == 3


def test_memory_is_shared_and_freed() -> None:
    """Buckets share one pool: six of them take far less than six times one."""
    model = make_model()
    write = GraphedWrite(model, warmup=1)

    def reserved(contexts: range) -> int:
        for context in contexts:
            for _ in range(2):
                write(make_batch(0, context, 8).context_ids)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = reserved(range(0))
    one = reserved(range(256, 257)) - before
    six = reserved(range(128, 256, 24)) - before
    assert six < 4 * one
    write.clear()
    assert reserved(range(0)) - before < one


def test_a_host_sync_is_refused_and_the_device_stays_usable() -> None:
    graphed = Graphed("mine", lambda x: x * x.sum().item(), make_model())
    with pytest.raises(GraphError, match=r"mine: aten\._local_scalar_dense\.default cannot be captured"):
        graphed(Input(torch.ones(2), (4,)))
    assert torch.ones(2, device="cuda").sum().item() == 2


def test_training(tmp_path: Path) -> None:
    """``auto`` captures, resuming goes on, and learns what training without graphs learns."""
    options = {"alphabet_size": 4, "key_length": 1, "value_length": 1, "pairs": 2, "start_pairs": 1, "advance_at": 0.3,
               "hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32, "memory_tokens": 2,
               "steps": 1, "inner_lr": 1.0, "batch_size": 8, "max_steps": 20, "eval_every": 10, "eval_samples": 8}
    losses = {}
    for mode in ("auto", "off"):
        trainer = Trainer(Experiment.from_options({**options, "cuda_graphs": mode}), tmp_path / mode, "cuda")
        assert trainer.graphs == (mode == "auto")
        seen: list[float] = []
        trainer.run(lambda _, entry, seen=seen: seen.append(entry["loss"]))
        losses[mode] = seen
    assert losses["auto"][:5] == pytest.approx(losses["off"][:5], rel=1e-3)
    assert (tmp_path / "auto" / CHECKPOINT).exists()
    assert Trainer.resume(tmp_path / "auto", {}, "cuda").graphs
