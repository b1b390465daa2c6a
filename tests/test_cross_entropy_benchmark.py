"""The cross-entropy suite: what it measures and refuses."""

from dataclasses import replace

import pytest
import torch

from benchmarks import cross_entropy as suite
from benchmarks.harness import Options, merged

QUICK = Options(quick=True, repeats=2)


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch):
    """A process of its own does not know the providers that tests make; test_benchmarks.py runs real ones."""
    monkeypatch.setattr(suite, "peak_rss", lambda *_: 1)


def test_every_provider_in_every_mode():
    report = merged(suite.run(QUICK))
    assert not report.refused
    found = {(row.provider, row.mode): row for row in report.rows}
    assert set(found) == {(provider.name, mode) for provider in suite.PROVIDERS for mode in provider.modes}
    for (provider, _), row in found.items():
        if provider != "torch-chunked":
            assert row.unavailable is None
            assert min(row.median_ms, row.tflops, row.peak_live_bytes, row.ratio_to_eager) > 0
            assert 0 < row.error < 1e-6
    assert suite.table(report.rows).renderables


def test_wrong_results_get_no_time(monkeypatch):
    eager = suite.PROVIDERS[0]
    wrong = replace(eager, name="peer", loss=lambda *x: eager.loss(*x) * (1 + 1e-4), modes=("forward_backward",))
    monkeypatch.setattr(suite, "PROVIDERS", (eager, wrong))
    report = suite.measure(suite.Shape(2, 5, 4, 7), torch.float32, QUICK)
    rows, refused = report.rows, report.refused
    assert {row.provider for row in rows} == {"eager"}
    assert len(refused) == 1
    assert "peer forward_backward: wrong against float64" in refused[0]


def test_long_samples_are_checked_on_their_beginning(monkeypatch):
    monkeypatch.setattr(suite, "CHECKED_LENGTH", 3)
    rows = suite.measure(suite.Shape(1, 5, 4, 7), torch.float32, QUICK).rows
    assert {row.checked_shape["length"] for row in rows} == {3}
    assert {row.shape["length"] for row in rows} == {5}
