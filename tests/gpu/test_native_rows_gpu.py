"""CUDA C++ kernels of ops on rows on a GPU: every dtype and layout, and what only a GPU can show."""

from __future__ import annotations

import pytest
import torch
from native_rows_checks import (
    CHECKS,
    CLIPS,
    DTYPES,
    LAYOUTS,
    ROTARY,
    ROWS,
    WIDTHS,
    check_rounding,
    on,
    rotary_case,
)
from second_order import (
    assert_close,
    check_determinism,
    check_dual_gradcheck,
    check_empty,
    check_gradcheck,
    derivatives,
)

from gradmem_kernels import backend as backends
from gradmem_kernels import inner_sgd, rms_norm, swiglu
from gradmem_kernels.native.common import refusal
from gradmem_kernels.rms_norm import rms_norm_dual

DEVICE = "cuda"
missing = refusal(torch.empty(0, device=DEVICE)) if torch.cuda.is_available() else "no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory"),
              pytest.mark.skipif(missing is not None, reason=str(missing))]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("check", [*CHECKS, check_gradcheck, check_dual_gradcheck],
                         ids=lambda f: f.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", ROWS)
def test_guarantees(name, check):
    """In float64."""
    check(on(ROWS[name](2, 3, 5), DEVICE))
    check(on(ROWS[name](2, 2, 1), DEVICE))


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ROWS)
def test_precision(name, width, layout, dtype):
    check_rounding(on(ROWS[name](3, 67, width), DEVICE), layout, dtype)


@by_dtype
@pytest.mark.parametrize("name", ROTARY)
def test_rotary_precision(name, dtype):
    for layout in LAYOUTS:
        check_rounding(on(rotary_case(name), DEVICE), layout, dtype)


@pytest.mark.parametrize("name", ROWS)
def test_empty(name):
    for shape in ((0, 2, 3), (2, 0, 3)):
        check_empty(on(ROWS[name](*shape), DEVICE))


@pytest.mark.parametrize("shape", [(5, 400, 256), (2, 3, 70001)], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_repeatable(name, shape):
    """Sums over rows too, over more rows than there are programs; and samples of more parts than a block has."""
    check_determinism(on(ROWS[name](*shape), DEVICE).to(torch.bfloat16))


@pytest.mark.parametrize("op", ["swiglu", "rms_norm", "inner_sgd"])
def test_tensors_beyond_two_to_the_31_elements(op):
    """The last row is right, so its address was."""
    width, rows = 4096, 2**19 + 3
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = torch.randn(width, device=DEVICE)
    how = {"backend": "native"}
    run = {"swiglu": lambda x: swiglu(x, x, **how), "rms_norm": lambda x: rms_norm(x, x[-1], **how),
           "inner_sgd": lambda x: inner_sgd(x, x, 0.5, **CLIPS, **how)}[op]
    y = run(x)
    assert torch.equal(y[-1], run(x[-1:])[0])
    assert not y[:-1].any()


def _both_orders(x, x_t, weight, a):
    y, y_t = rms_norm_dual(x, weight, x_t, backend="native")
    step = inner_sgd(y, y_t, 0.1, **CLIPS, backend="native")
    return [step, *torch.autograd.grad((step, swiglu(y, y_t, backend="native")), (x, weight), (a, a))]


def test_graph_capture():
    """Both orders in one CUDA graph give, replayed on new inputs, the bits of plain calls."""
    x, x_t, a, weight, other = torch.randn(5, 256, 256, device=DEVICE).bfloat16().unbind(0)
    x, weight, other = x.clone().requires_grad_(), weight[0].clone().requires_grad_(), other.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _both_orders(x, x_t, weight, a)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _both_orders(x, x_t, weight, a)
    for given in (x.detach().clone(), other):
        with torch.no_grad():
            x.copy_(given)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [t.detach().clone() for t in captured]
        assert all(map(torch.equal, replayed, _both_orders(x, x_t, weight, a)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("name", ROWS)
def test_another_device_than_the_current_one(name):
    one = ROWS[name](2, 3, 8)
    a, u = one.cotangent(), tuple(map(torch.randn_like, one.inputs))
    torch.cuda.set_device(0)
    moved = on(one, "cuda:1")
    actual = derivatives(moved.run_op, moved.inputs, a.to("cuda:1"), tuple(t.to("cuda:1") for t in u))
    assert torch.cuda.current_device() == 0
    assert_close({name: t.cpu() for name, t in actual.named().items()},
                 derivatives(one.run_plain, one.inputs, a, u).named())


def test_the_current_stream():
    """Work is ordered behind what was given to the stream before."""
    x = torch.zeros(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            x = x @ x + 1.0  # keeps the stream busy
        y = swiglu(x, x, backend="native")
        expected = swiglu(x, x, backend="reference")
    torch.cuda.synchronize()
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_the_automatic_choice():
    """Triton's kernels until these were measured."""
    x = torch.ones(2, 8, device=DEVICE)
    assert backends.select("rms_norm", None, x).__name__ == "gradmem_kernels.triton.rms_norm"
    assert backends.select("inner_sgd", None, x).__name__ == "gradmem_kernels.reference.inner_sgd"
