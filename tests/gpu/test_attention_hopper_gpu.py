"""Attention's kernels for Hopper on a GPU."""

from __future__ import annotations

import pytest
import torch
from attention_hopper_checks import CALLS, EMPTY, SOME, check_call, check_empty, check_some

from gradmem_kernels import attention, attention_dual
from gradmem_kernels.native.attention import refusal

DEVICE = "cuda"
missing: str | None = "no CUDA device"
if torch.cuda.is_available():
    missing = refusal(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=DEVICE))
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory"),
              pytest.mark.skipif(missing is not None, reason=str(missing))]


def random(*shape, device=DEVICE):
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def run(q):
    return attention(q, q, q, causal=True, backend="native", first_order="own")


@pytest.mark.parametrize("name", CALLS)
def test_every_kernel(name):
    check_call(name, DEVICE)


@pytest.mark.parametrize("name", SOME)
def test_some_tangents_and_cotangents(name):
    check_some(name, DEVICE)


@pytest.mark.parametrize("name", EMPTY)
def test_empty(name):
    check_empty(name, DEVICE)


@pytest.mark.parametrize("d", [64, 128])
def test_long_sequences_repeat_their_bits(d):
    """Many tiles are on their way at once: a race would show."""
    x = [random(2, heads, 4100, d).requires_grad_() for heads in (8, 2, 2, 8, 2, 2)]
    results = []
    for _ in range(5):
        o, o_t = attention_dual(*x, causal=True, backend="native")
        results.append((o, o_t, *torch.autograd.grad((o, o_t), x, (x[0], x[3]))))
    assert all(t.isfinite().all() for t in results[0])
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


def test_graph_capture():
    q = random(1, 2, 200, 64)
    expected = run(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(q)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device():
    q = random(1, 2, 200, 64, device="cuda:1")
    found = run(q)
    assert found.device == q.device
    assert torch.equal(found.cpu(), run(q.to("cuda:0")).cpu())
