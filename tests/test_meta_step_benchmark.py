"""The meta-step suite beyond the paper's model: counted operations, the price of second order, memory over K and S."""

from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console

from benchmarks import flops, footprint, harness, meta_step
from benchmarks import meta_step_parts as parts
from benchmarks.meta_step_parts import CUDA, Case, Part, measure
from benchmarks.meta_step_providers import EAGER, FIRST_ORDER, PROVIDERS, Provider, make_step
from benchmarks.on_meta import triton_on_meta
from benchmarks.shapes import LLAMA_1B, QUICK
from gradmem_kernels import attention
from gradmem_kernels import backend as backends

LIBRARY = PROVIDERS[1:]
OPTIONS = harness.Options(quick=True, repeats=1)
#: Every size another one, so that none passes for another.
UNEVEN = replace(QUICK, layers=3, heads=4, kv_heads=2, width=32, intermediate=40, vocabulary=50, context_tokens=17,
                 memory_tokens=3, query_tokens=5)


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch):
    """A process of its own does not know the providers that tests make; test_benchmarks.py runs real ones."""
    monkeypatch.setattr(parts, "peak_rss", lambda *_: 1)


def part(**changes):
    cases = [Case(LIBRARY[1], QUICK), Case(LIBRARY[1], replace(QUICK, steps=0)),
             *(Case(first, QUICK) for first in FIRST_ORDER)]
    return replace(Part(cases, torch.float32, replace(QUICK, context_tokens=5)), **changes)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("provider", LIBRARY, ids=str)
def test_what_runs_is_the_cost_model(provider, trained, steps):
    """Not within 5 %, but exactly: every product is accounted for."""
    shape = replace(UNEVEN, steps=steps)
    found = flops.executed(make_step(provider, shape, trained=trained))
    assert found == pytest.approx(flops.model(shape, provider.mode, trained=trained), rel=1e-9)


@pytest.mark.parametrize("provider", LIBRARY, ids=str)
def test_the_cost_model_at_the_size_of_llama(provider):
    pytest.importorskip("triton")
    shape = replace(LLAMA_1B, context_tokens=1024, steps=1)
    with triton_on_meta():
        found = flops.executed(make_step(provider, shape, torch.bfloat16, device="meta"))
    expected = flops.model(shape, provider.mode)
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.05)


@pytest.mark.parametrize(("mode", "trained", "passes"), [
    ("none", True, 6), ("step", True, 8), ("layer", True, 10), ("none", False, 4), ("step", False, 6),
    ("layer", False, 8)])
def test_passes_of_a_step(mode, trained, passes):
    """The rule of thumb, where linear layers are nearly everything: a checkpoint spares 2 of the last product."""
    shape = replace(LLAMA_1B, layers=1000, context_tokens=100, steps=1)
    one, two = (flops.model(replace(shape, steps=k), mode, trained=trained)["linear"] for k in (1, 2))
    width, inner, rows = shape.width, shape.intermediate, shape.context_tokens + shape.memory_tokens - 1
    down = 2 * rows * width * inner
    forward = shape.layers * (3 * down + 2 * rows * width * (2 * width + 2 * 512))
    saved = 2 * shape.layers * down if mode == "layer" else 0
    assert (two - one + saved) / forward == pytest.approx(passes, rel=2e-3)


def test_counted_products():
    a, b, c = torch.randn(2, 3), torch.randn(3, 5), torch.randn(2, 5)
    x, y = torch.randn(4, 2, 3), torch.randn(4, 3, 5)

    def work():
        a @ b
        c.addmm_(a, b)
        torch.nn.functional.linear(a, b.mT, c[0])
        x @ y
        torch.baddbmm(torch.zeros(4, 2, 5), x, y)

    assert flops.executed(work) == {"linear": (3 + 2 * 4) * 2 * 2 * 3 * 5, "attention": 0, "head": 0}


def test_attention_that_the_table_does_not_have():
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    with pytest.raises(ValueError, match="attention, backward: expected every tangent"):
        flops.executed(lambda: attention(q.requires_grad_(), k, v).sum().backward())


def test_plain_pytorch_multiplies_hidden_pairs_too():
    """Its attention is full: twice the causal products, and they count as what they are."""
    shape = replace(UNEVEN, steps=0)
    found = sum(flops.executed(make_step(EAGER, shape)).values())
    read = flops.model(shape, "none")
    # 4 products backward instead of 5, and logits that were kept
    full, head = read["attention"] / 7 * 2 * 6, read["head"] / 4 * 3
    assert found == pytest.approx(read["linear"] + full + head)


def test_rows_of_a_part(monkeypatch):
    ticks = {"step": 5.0, "first-order": 1.0}
    monkeypatch.setattr(parts, "make_step", lambda provider, shape, *_, **__: lambda: tick(provider, shape))

    def tick(provider, shape):
        return {"seconds": 1.0 if shape.steps == 0 else ticks[provider.mode] * (1 + (provider.name == "sdpa"))}

    monkeypatch.setattr(parts, "check", lambda *_: parts.Found(1e-3, 2e-3))
    options = replace(OPTIONS, repeats=5)
    report = measure("price", part(counted=False, rounds=2), options, clock=lambda work: work()["seconds"])
    step, read, first, sdpa = report.rows
    assert not report.refused
    assert (step.median_ms, read.median_ms, first.median_ms, sdpa.median_ms) == (5000, 1000, 1000, 2000)
    # (5 s - 1 s) / 2 steps over 1 s
    assert (step.price, step.price_of) == (2.0, "gradmem first-order")
    assert read.price is first.price is sdpa.price is None
    assert (step.step, step.dtype, step.repeats, step.shape) == ("price", "float32", 2, asdict(QUICK))
    assert step.checked_shape == {**asdict(QUICK), "context_tokens": 5}
    assert step.tflops == pytest.approx(QUICK.flops() / 5e12)
    assert first.tflops is None


def test_a_part_runs(capsys):
    """Everything is admitted, counted and measured on a CPU."""
    pytest.importorskip("triton")
    report = measure("price", part(), OPTIONS, clock=harness.wall_clock)
    assert not report.refused
    assert [row.unavailable for row in report.rows] == [None] * 4
    for row in report.rows:
        assert row.error < 1e-4
        assert row.peak_live_bytes > 0
        assert row.executed_flops > 0
    step, read, *_ = report.rows
    assert step.executed_flops == pytest.approx(step.model_flops)
    assert read.executed_flops == pytest.approx(read.model_flops)
    Console(width=200).print(meta_step.table(report.rows))
    printed = capsys.readouterr().out
    assert "first-order" in printed
    assert "'context_tokens': 5" in printed


@pytest.mark.parametrize(("provider", "raised", "unavailable", "refused"), [
    (EAGER, torch.OutOfMemoryError(), "out of memory", None),
    (LIBRARY[0], torch.OutOfMemoryError(), "out of memory", None),
    (EAGER, RuntimeError("too large\nmore"), "RuntimeError: too large", None),
    (LIBRARY[0], RuntimeError("bug"), None, "gradmem none: RuntimeError: bug")], ids=str)
def test_who_does_not_run(provider, raised, unavailable, refused, monkeypatch, capsys):
    def fails(who, shape, *args, **options):
        if shape.context_tokens == 7:
            raise raised
        return make_step(who, shape, *args, **options)

    monkeypatch.setattr(parts, "make_step", fails)
    cases = [Case(provider, QUICK), Case(provider, replace(QUICK, context_tokens=7))]
    report = measure("flat", part(cases=cases, timed=False, counted=False), OPTIONS)
    assert [row.unavailable for row in report.rows] == [None, unavailable][: 1 if refused else 2]
    assert list(report.refused) == ([refused] if refused else [])
    Console(width=200).print(meta_step.table(report.rows))
    assert f"K=2 S={QUICK.context_tokens}" in capsys.readouterr().out


def test_a_wrong_provider_gets_no_rows(monkeypatch):
    def wrong(provider, *args, **options):
        step = make_step(provider, *args, **options)

        def scaled():
            loss, gradients = step()
            return loss, {name: g * (1.001 if provider == LIBRARY[1] else 1) for name, g in gradients.items()}

        return scaled

    monkeypatch.setattr(parts, "make_step", wrong)
    report = measure("price", part(counted=False), OPTIONS, clock=lambda work: 1.0)
    assert {(row.provider, row.mode) for row in report.rows} == set(FIRST_ORDER)
    assert len(report.refused) == 1
    assert "gradmem step: wrong against float64" in report.refused[0]


def test_tf32_is_the_parts_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(parts, "check", lambda *_: seen.append(torch.get_float32_matmul_precision())
                        or parts.Found(unavailable="x"))
    before = torch.get_float32_matmul_precision()
    report = measure("paper", part(tf32=True, timed=False), OPTIONS)
    assert set(seen) == {"high"}
    assert torch.get_float32_matmul_precision() == before
    assert {row.dtype for row in report.rows} == {"tf32"}


def test_parts_of_a_gpu():
    """The shapes that are asked for: K and S of the sweep, and a price that can be computed."""
    assert {(case.shape.steps, case.shape.context_tokens) for case in CUDA["flat"].cases} == {
        *((k, 4096) for k in (1, 2, 4, 8, 32)), *((2, 2**n) for n in range(10, 16))}
    seconds = {case: [1.0] for case in CUDA["price"].cases}
    priced = [case.provider.mode for case in seconds if parts.price(case, seconds)]
    assert priced == ["none", "step", "layer"]
    assert all(case.shape.steps == 8 and case.shape.context_tokens == 32768 for case in CUDA["long"].cases)


@pytest.mark.parametrize("provider", LIBRARY, ids=str)
def test_footprint(provider):
    """Memory does not grow with K in a meta-step that recomputes, and the model is near what is measured."""
    pytest.importorskip("triton")
    shape = replace(LLAMA_1B, layers=4, vocabulary=1000, context_tokens=1024, steps=1)
    one, many = (footprint.measured_bytes(provider, replace(shape, steps=k)) for k in (1, 4))
    memories = 3 * 4 * shape.memory_tokens * shape.width
    if provider.mode == "none":
        assert many > 1.2 * one
    else:
        assert many - one - memories < 0.02 * one
    # it adds up what is not there at the same time: a step's gradients come while its activations go
    for steps, measured in ((1, one), (4, many)):
        assert 0.95 < footprint.model_bytes(provider, replace(shape, steps=steps)) / measured < 1.4


def test_triton_on_meta():
    pytest.importorskip("triton")
    here, there = torch.empty(1), torch.empty(1, device="meta")
    as_ever = backends.select("swiglu", None, here, here)
    with triton_on_meta():
        assert "triton" in backends.select("swiglu", None, there, there).__name__
        assert backends.select("swiglu", None, here, here) is as_ever
        assert "reference" in backends.select("linear_cross_entropy", None, there, there, None).__name__
    assert "reference" in backends.select("swiglu", None, there, there).__name__


def test_both_first_order_steps_are_the_same():
    ours, sdpa = (make_step(first, QUICK, torch.float64)() for first in FIRST_ORDER)
    assert max(harness.relative_errors(ours, sdpa).values()) < 1e-9


def test_tied_embeddings_get_one_gradient():
    shape = replace(QUICK, tied=1)
    exact = make_step(EAGER, shape, torch.float64)()
    assert "head" not in exact[1]
    assert max(harness.relative_errors(make_step(LIBRARY[1], shape, torch.float64)(), exact).values()) < 1e-9
    loss, frozen = make_step(Provider("gradmem", "step"), shape, trained=False)()
    assert set(frozen) == {"memory"}
    assert loss.isfinite()
