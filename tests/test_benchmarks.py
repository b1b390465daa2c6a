"""The measuring instruments: what the benchmarks report must itself be right."""

import functools
import json
import sys
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks import __main__ as command
from benchmarks import harness, memory, meta_step_providers, rows
from benchmarks.live_memory import LiveMemory, peak_live_bytes
from benchmarks.meta_step import admit
from benchmarks.meta_step_providers import EAGER, PROVIDERS, make_step
from benchmarks.shapes import QUICK


class Doubled(torch.autograd.Function):
    """Twice its input, with a scratch tensor of 4000 bytes forwards and of 80000 bytes backwards."""

    @staticmethod
    def forward(ctx, x):
        torch.empty(1000)
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        torch.empty(20000)
        return 2 * grad


def attention_twice():
    """A double backward with views, in-place accumulation and saved tensors."""
    torch.manual_seed(0)
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(3)]
    x = torch.randn(8, 16, 64, requires_grad=True)
    h = x
    for weight in weights:
        q = F.silu(h @ weight).view(8, 16, 4, 16).transpose(1, 2)
        h = ((q @ q.mT).softmax(-1) @ q).transpose(1, 2).reshape(8, 16, 64)
    loss = F.cross_entropy(h.flatten(0, 1), torch.zeros(128, dtype=torch.long))
    grad, = torch.autograd.grad(loss, x, create_graph=True)
    (grad.square().sum() + loss).backward()


def test_live_memory_counts_each_storage_until_it_is_freed():
    before = torch.zeros(500)
    with LiveMemory() as live:
        a = torch.zeros(1000)
        view = a.view(10, 100).t()
        old = before.view(5, 100)
        assert live.live == 4000
        b = a + 1
        b.add_(1)
        assert live.live == 8000
        del a
        assert live.live == 8000
        del view
        assert live.live == 4000
        del b, old
    assert (live.live, live.peak) == (0, 8000)


def test_live_memory_sees_inside_functions_and_their_backward():
    x = torch.ones(10, requires_grad=True)
    with LiveMemory() as live:
        y = Doubled.apply(x)
        assert live.peak == 4000
        y.sum().backward()
    assert 80000 < live.peak < 80000 + 5 * 40


def test_live_memory_agrees_with_the_allocator():
    attention_twice()
    ours = peak_live_bytes(attention_twice)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        attention_twice()
    live = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert ours == peak


@pytest.mark.parametrize("provider", PROVIDERS, ids=str)
def test_every_provider_computes_the_same_meta_step(provider):
    exact = make_step(EAGER, QUICK, torch.float64)()
    errors = harness.relative_errors(make_step(provider, QUICK, torch.float64)(), exact)
    assert max(errors.values()) < 1e-9, errors


def test_gate_refuses_a_wrong_gradient(monkeypatch):
    first_order = functools.partial(meta_step_providers.write, order="first")
    monkeypatch.setattr(meta_step_providers, "write", first_order)
    admitted, refused = admit(PROVIDERS, QUICK)
    assert list(admitted) == [EAGER]
    assert len(refused) == len(PROVIDERS) - 1
    assert "wrong against float64" in refused[0]


def test_gate_refuses_nan():
    assert harness.gate("it", {"loss": float("nan")}, {"loss": 1e-7}) is not None
    assert harness.gate("it", {"loss": 2e-7}, {"loss": 1e-7}) is None


def test_errors():
    one, zero = torch.ones(4), torch.zeros(4)
    found = harness.errors({"a": one, "b": zero, "c": one}, {"a": one / 2, "b": zero, "c": zero})
    assert found == {"a": 1.0, "b": 0.0, "c": float("inf")}
    assert harness.gate("it", found, {"a": 1.0, "b": 0.0, "c": 0.0}) == (
        "it: wrong against float64: c: inf, plain PyTorch 0.0e+00")
    with pytest.raises(ValueError, match=r"a: expected shape \[4\], got \[1, 4\]"):
        harness.errors({"a": one[None]}, {"a": one})


def test_what_is_measured_is_kept_whatever_comes_next(tmp_path, monkeypatch, capsys):
    """A stage on a GPU may be stopped at any time; and reasons are not wrapped, which others read."""
    row, reason = harness.Row("memory", "x", *EAGER, "float32", {}), "wrong " * 50

    def run(options):
        yield harness.Report([row], [reason])
        raise KeyboardInterrupt

    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(command.SUITES["memory"], "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "memory", "--quick", "--rows", str(file)])
    with pytest.raises(KeyboardInterrupt):
        command.main()
    assert [line["step"] for line in map(json.loads, file.read_text().splitlines())] == ["x"]
    monkeypatch.setattr(command.SUITES["memory"], "run", lambda options: [harness.Report([], [reason])])
    assert command.main() == 1
    assert command.REFUSED + reason in capsys.readouterr().out


def test_peak_memory_is_flat_in_the_steps():
    """The claim of the memory suite: a recomputed step leaves its M_k, and its loss and gradient norm a sample."""
    for provider in PROVIDERS:
        few, many = (harness.Row("memory", "meta-step", *provider, "float32", vars(shape),
                                 peak_live_bytes=peak_live_bytes(make_step(provider, shape)))
                     for shape in (replace(QUICK, steps=2), replace(QUICK, steps=5)))
        growth = memory.beyond_memories(few, many)
        if provider.mode in ("step", "layer"):
            assert growth <= 2 * 4 * QUICK.batch, (provider, growth)
        else:
            assert growth > 4 * QUICK.batch * QUICK.context_tokens * QUICK.width, (provider, growth)


def test_quantiles():
    assert harness.quantiles([5.0]) == (5.0, 5.0, 5.0)
    assert harness.quantiles([0.0, 5.0, 1.0, 4.0, 2.0, 3.0]) == (1.0, 2.5, 4.0)


@pytest.mark.parametrize("suite", command.SUITES)
def test_every_suite_runs(suite, monkeypatch, capsys):
    monkeypatch.setattr(command.SUITES[suite], "PROVIDERS", command.SUITES[suite].PROVIDERS[:2])
    parts = {"ops": ["add_rms_norm", "rotary"], "meta-step": ["no-page-faults"]}.get(suite, [])
    monkeypatch.setattr(sys, "argv", ["benchmarks", suite, "--quick", *(f"--only={part}" for part in parts)])
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert "eager" in printed or suite == "footprint"  # which compares with a model
    assert "gradmem" in printed


@pytest.mark.parametrize(("arguments", "named"), [
    (["memory", "--quick", "--store"], "--store"),
    (["memory", "--repeats", "0"], "--repeats: expected at least 1, got 0"),
    (["nothing"], "meta-step"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_bad_arguments_are_refused(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert named in capsys.readouterr().err


def test_store_appends_rows_with_their_provenance(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    where = replace(harness.Provenance.here(), commit="0" * 40, modified=False)
    row = harness.Row("memory", "meta-step", *EAGER, "float32", vars(QUICK), peak_live_bytes=1, provenance=where)
    for _ in range(2):
        path = harness.store(harness.Report([row]), "memory")
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(stored) == 2
    assert stored[0].keys() == {f.name for f in fields(harness.Row)}
    assert stored[0]["provenance"]["torch"] == torch.__version__


@pytest.mark.parametrize("change", [{"modified": True}, {"commit": None}], ids=str)
def test_store_refuses_what_no_commit_describes(change, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    where = replace(harness.Provenance.here(), **{"commit": "0" * 40, "modified": False} | change)
    row = harness.Row("memory", "meta-step", *EAGER, "float32", vars(QUICK), provenance=where)
    with pytest.raises(SystemExit, match="commit first"):
        harness.store(harness.Report([row]), "memory")
    assert not list(tmp_path.iterdir())
