"""The cross-entropy suite: what it measures and refuses."""

from dataclasses import replace

import torch

from benchmarks import cross_entropy as suite
from benchmarks.harness import Options

QUICK = Options(quick=True, repeats=2)


def test_every_provider_in_every_mode():
    report = suite.run(QUICK)
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
    rows, refused = suite.measure(suite.Shape(2, 5, 4, 7), torch.float32, QUICK)
    assert {row.provider for row in rows} == {"eager"}
    assert len(refused) == 1
    assert "peer forward_backward: wrong against float64" in refused[0]


def test_long_samples_are_checked_on_their_beginning(monkeypatch):
    monkeypatch.setattr(suite, "CHECKED_LENGTH", 3)
    rows, _ = suite.measure(suite.Shape(1, 5, 4, 7), torch.float32, QUICK)
    assert {row.checked_shape["length"] for row in rows} == {3}
    assert {row.shape["length"] for row in rows} == {5}
