"""The footprint of WRITE against what is alive, and what ``recompute="auto"`` makes of it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.live_memory import LiveMemory
from gradmem_kernels import Decoder, DecoderConfig, Prefix, PrefixLoss, recompute, resolve_recompute, write
from gradmem_kernels.checks import ArgumentError
from gradmem_kernels.recompute import RECOMPUTE, SHARE, free_memory

SIZES: dict[str, Any] = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 192}
GPT2 = {"norm": "layer", "norm_bias": True, "activation": "gelu", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
        "learned_positions": 512}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 2}, "gpt2": GPT2, "qwen3": {"qk_norm": True},
    "neox": {"norm": "layer", "norm_bias": True, "activation": "gelu", "parallel_residual": True}}


def case(layers: int, tokens: int, trained: bool, **options: Any) -> tuple[PrefixLoss, Tensor, list[Tensor]]:
    """A loss, the memory to start from, and what gets an outer gradient."""
    decoder = Decoder(DecoderConfig(num_layers=layers, **SIZES, **options)).requires_grad_(trained)
    tables = [torch.randn(32, 64, requires_grad=trained) for _ in range(2)]
    ids, memory = torch.randint(32, (2, tokens)), torch.randn(2, 8, 64, requires_grad=True)
    loss = PrefixLoss(decoder, Prefix(64), F.embedding(ids, tables[0]), ids, tables[1])
    return loss, memory, [memory, *(p for p in (*tables, *decoder.parameters()) if p.requires_grad)]


def peak(loss: PrefixLoss, memory: Tensor, wanted: list[Tensor], steps: int, mode: str) -> int:
    def work() -> None:
        out = write(loss, memory, steps=steps, lr=0.1, recompute=mode)
        torch.autograd.grad(out.memory.square().sum(), wanted, retain_graph=True)

    work()  # makes the rotary tables
    with LiveMemory() as memory_used:
        work()
    return memory_used.peak


@pytest.mark.parametrize(("family", "trained"), [("llama", True), ("llama", False), ("gpt2", True), ("neox", False),
                                                 ("qwen3", True)])
def test_footprint_is_what_is_alive(family: str, trained: bool) -> None:
    loss, memory, wanted = case(4, 160, trained, **FAMILIES[family])
    for mode in RECOMPUTE:
        ratio = loss.footprint(memory, steps=2, recompute=mode) / peak(loss, memory, wanted, 2, mode)
        # "layer" is estimated as if its inner step and its outer backward were alive at once
        assert 0.8 < ratio < (1.4 if mode == "layer" else 1.3), (mode, ratio)


def test_footprint_grows_with_what_it_should() -> None:
    def bytes_of(mode: str, layers: int = 8, tokens: int = 512, steps: int = 2) -> int:
        loss, memory, _ = case(layers, tokens, False)
        return loss.footprint(memory, steps=steps, recompute=mode)

    assert bytes_of("none", steps=8) > 3.5 * bytes_of("none")
    for mode in ("step", "layer"):
        assert bytes_of(mode, steps=32) == bytes_of(mode, steps=2)
    for mode in RECOMPUTE:
        assert bytes_of(mode, tokens=1024) == pytest.approx(2 * bytes_of(mode), rel=0.02)
    assert bytes_of("layer") < 0.6 * bytes_of("step") < 0.6 * bytes_of("none")


def test_the_fastest_that_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, memory, _ = case(2, 64, True)
    need = {mode: loss.footprint(memory, steps=2, recompute=mode) for mode in RECOMPUTE}
    assert need["none"] > need["step"] > need["layer"]
    for free, expected in ((need["none"] / SHARE + 1, "none"), (need["none"] / SHARE - 1, "step"),
                           (need["step"] / SHARE - 1, "layer"), (0, "layer"), (None, "step")):
        monkeypatch.setattr(recompute, "free_memory", lambda device, free=free: free)
        assert resolve_recompute(loss, memory, steps=2) == expected


def test_a_loss_without_footprint_keeps_its_memories_alone() -> None:
    assert resolve_recompute(lambda m: m.square().sum((1, 2)), torch.zeros(2, 3, 4), steps=2) == "step"


@pytest.mark.parametrize("chosen", RECOMPUTE)
def test_write_does_what_auto_stands_for(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, memory, wanted = case(2, 9, True)
    monkeypatch.setattr(importlib.import_module("gradmem_kernels.write"), "resolve_recompute",
                        lambda *args, **options: chosen)
    auto, named = (write(loss, memory, steps=2, lr=0.1, recompute=mode).memory for mode in ("auto", chosen))
    assert torch.equal(auto, named)
    gradients = [torch.autograd.grad(m.square().sum(), wanted, retain_graph=True) for m in (auto, named)]
    assert all(map(torch.equal, *gradients))


def test_free_memory() -> None:
    free = free_memory(torch.device("cpu"))
    if Path("/proc/meminfo").exists():
        assert free is not None
        assert 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory is known under Linux only")
@pytest.mark.parametrize(("limit", "used", "free"), [("5000", "2000", 3000), ("2000", "5000", 0), ("max", "2000", None),
                                                     (None, None, None)])
def test_free_memory_of_a_container(limit: str | None, used: str | None, free: int | None, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("memory.max", limit), ("memory.current", used)):
        if value is not None:
            (tmp_path / name).write_text(f"{value}\n")
    monkeypatch.setattr(recompute, "CONTROL_GROUP", tmp_path)
    found = free_memory(torch.device("cpu"))
    assert found is not None
    assert found == free if free is not None else found > 2**20


@pytest.mark.parametrize("mode", ["none", "step"])
def test_footprint_of_qk_norm(mode: str) -> None:
    """What it adds is there."""
    sizes = [(loss.footprint(memory, steps=2, recompute=mode), peak(loss, memory, wanted, 2, mode))
             for loss, memory, wanted in (case(4, 160, True, qk_norm=norm) for norm in (True, False))]
    (estimate, alive), (plain_estimate, plain_alive) = sizes
    assert 0.5 < (estimate - plain_estimate) / (alive - plain_alive) < 1.5


def test_footprint_leaves_out_gradients_that_a_step_does_not_make() -> None:
    """A projection that is each sample's own gets its gradient as the memory's beginning, once."""
    loss, memory, _ = case(1, 4, False)
    own = torch.eye(64).expand(2, -1, -1), torch.zeros(2, 64)
    sizes = []
    for per_sample in (False, True):
        loss.prefix = Prefix(64, control_tokens=2, projection=True, per_sample=per_sample)
        sizes.append(loss.footprint(memory, *own * per_sample, steps=2, recompute="step"))
        assert {id(loss.prefix.start), id(loss.prefix.end)} <= {id(t) for t in loss.params}
    shared, each = sizes
    assert shared - each == 2 * 4 * (64 * 64 + 64)


def test_unknown_modes_are_refused() -> None:
    loss, memory, _ = case(1, 4, False)
    with pytest.raises(ArgumentError, match=r"footprint: recompute: expected one of none, step, layer, got 'auto'"):
        loss.footprint(memory, steps=1, recompute="auto")
    with pytest.raises(ArgumentError, match=r"footprint: steps: expected an integer >= 0, got -1"):
        loss.footprint(memory, steps=-1, recompute="step")
    with pytest.raises(ArgumentError, match="recompute: expected one of none, step, layer, auto, got 'some'"):
        write(loss, memory, steps=1, lr=0.1, recompute="some")
