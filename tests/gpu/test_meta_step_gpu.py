"""The GPU parts of the meta-step suite on small shapes: they run, and a captured step is the step."""

from dataclasses import replace

import pytest
import torch

from benchmarks import harness
from benchmarks.meta_step_parts import CUDA, Case, measure
from benchmarks.meta_step_providers import FIRST_ORDER, GRAPHS, make_step
from benchmarks.shapes import QUICK

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

#: Head dimension 64, which PyTorch's flash attention serves.
SMALL = replace(QUICK, heads=4, kv_heads=2, width=256, intermediate=512, vocabulary=1000, context_tokens=200,
                memory_tokens=8, tied=1)
OPTIONS = harness.Options(quick=True, repeats=2, device="cuda")


@pytest.mark.parametrize("name", CUDA)
def test_part(name):
    part = CUDA[name]
    small = {case: Case(case.provider, replace(SMALL, steps=min(case.shape.steps, 3))) for case in part.cases}
    report = measure(name, replace(part, cases=list(dict.fromkeys(small.values())), checked=SMALL), OPTIONS)
    assert not report.refused
    for row in report.rows:
        assert row.unavailable is None
        assert row.peak_device_bytes is not None or row.provider == "gradmem-graph"
        assert (row.median_ms is not None, row.l2) == (part.timed, "flushed" if part.timed else None)
        if name == "price" and row.mode != "first-order" and row.shape["steps"] > 0:
            assert row.price > 0
            assert row.price_of in map(str, FIRST_ORDER)


@pytest.mark.parametrize("provider", GRAPHS, ids=str)
def test_captured_step(provider):
    """Replays give what the step gives, and go on doing so."""
    expected = make_step(provider._replace(name="gradmem"), SMALL, device="cuda")()
    replay = make_step(provider, SMALL, device="cuda")
    for _ in range(2):
        assert max(harness.relative_errors(replay(), expected).values()) < 1e-5
