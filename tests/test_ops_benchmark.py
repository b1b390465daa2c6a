"""The ops suite: what it refuses, and that all providers do the same work."""

from functools import partial

import pytest
import torch

from benchmarks import harness
from benchmarks import ops as suite
from benchmarks.ops_providers import EAGER, OPS, Provider, by_autograd, draw

OPTIONS = harness.Options(quick=True, repeats=2)
SHAPE = {"rows": 3, "width": 16}


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch):
    """A process of its own does not know the providers that tests make; test_benchmarks.py runs real ones."""
    monkeypatch.setattr(suite, "peak_rss", lambda *_: 1)


def measured(op, *providers, monkeypatch):
    monkeypatch.setattr(suite, "PROVIDERS", (EAGER, *providers))
    return suite.measure(OPS[op], SHAPE, torch.float32, OPTIONS)


def changed(mode, name, change):
    """Plain PyTorch, but for one result of one mode."""
    def prepare(op, of, data):
        work = EAGER.prepare(op, of, data)
        return work if of != mode else lambda: {which: change(t) if which == name else t
                                                for which, t in work().items()}

    return Provider("peer", prepare)


@pytest.mark.parametrize(("name", "change"), [
    ("second derivative 2", lambda t: t + 1e-3), ("second derivative 0", lambda t: t * 1.001)],
    ids=["what is exactly zero", "the input's"])
def test_wrong_results_get_no_time(name, change, monkeypatch):
    """The second derivative by a bias is zero, and nothing else passes for it."""
    report = measured("layer_norm", changed("double_backward", name, change), monkeypatch=monkeypatch)
    assert len(report.refused) == 1
    assert f"peer layer_norm double_backward: wrong against float64: {name}" in report.refused[0]
    assert {row.mode for row in report.rows if row.provider == "peer"} == set(OPS["layer_norm"].passes) - {
        "double_backward"}


def test_results_of_another_shape_are_not_results(monkeypatch):
    report = measured("gelu", changed("forward", "y 0", lambda t: t[None]), monkeypatch=monkeypatch)
    missing, = (row for row in report.rows if row.provider == "peer" and row.unavailable)
    assert missing.unavailable == "ValueError: y 0: expected shape [3, 16], got [1, 3, 16]"


@pytest.mark.parametrize(("name", "refused"), [("gradmem-native", True), ("peer", False)])
def test_who_raises_is_named_and_the_others_are_measured(name, refused, monkeypatch):
    def fails(*_):
        raise RuntimeError("bug\nmore")

    report = measured("gelu", Provider(name, fails), monkeypatch=monkeypatch)
    assert bool(report.refused) == refused
    assert all("RuntimeError: bug" in reason for reason in report.refused)
    assert {row.mode for row in report.rows if row.median_ms} == set(OPS["gelu"].passes)


@pytest.mark.parametrize("formula", ["plain", "vendor"])
def test_nothing_is_kept_for_a_backward_pass_that_does_not_come(formula):
    data = draw(OPS["rms_norm"], SHAPE, torch.float32, "cpu")
    y = partial(by_autograd, formula)(OPS["rms_norm"], "forward", data)()
    assert not any(t.requires_grad for t in y.values())
