"""Norms, activations and rotary on a GPU: every dtype and tile, and what only a GPU can show.

The kernels themselves have their tests in tests/interpreter, which knows no bfloat16, no streams and no large tensors.
Errors follow the rule of tests/second_order.py: at most twice those of plain PyTorch in the same dtype.
"""

from dataclasses import replace

import pytest
import test_add_norms
import test_gelu
import test_layer_norm
import test_rms_norm
import test_rotary
import test_swiglu
import torch
from second_order import Case, check_determinism, check_precision

from gradmem_kernels import backend as backends
from gradmem_kernels import gelu, rms_norm, swiglu
from gradmem_kernels.rms_norm import rms_norm_dual

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory"),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = {
    "rms_norm": lambda width: test_rms_norm.case("triton", (3, 67, width)),
    "layer_norm": lambda width: test_layer_norm.case("triton", (3, 67, width)),
    "layer_norm_no_bias": lambda width: test_layer_norm.case("triton", (3, 67, width), bias=False),
    "add_rms_norm": lambda width: test_add_norms.case("triton", (3, 67, width)),
    "add_layer_norm": lambda width: test_add_norms.case("triton", (3, 67, width), "layer"),
    "swiglu": lambda width: test_swiglu.case("triton", 3, 67, width),
    "gelu": lambda width: test_gelu.case("triton", 3, 67, width),
    "gelu_tanh": lambda width: test_gelu.case("triton", 3, 67, width, approximate="tanh"),
}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def on_gpu(case: Case) -> Case:
    return replace(case, inputs=tuple(t.to(DEVICE) for t in case.inputs),
                   aux={name: t.to(DEVICE) for name, t in case.aux.items()})


@by_dtype
@pytest.mark.parametrize("width", [65, 128, 1000, 4096])
@pytest.mark.parametrize("name", CASES)
def test_precision(name, width, dtype):
    # half-precision results are rounded once, unless the hardware's exp is what errs
    check_precision(on_gpu(CASES[name](width)), dtype, only_rounds=False)


@by_dtype
@pytest.mark.parametrize("width", [5120, 8192, 16384, 20000])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"])
def test_wide_rows(name, width, dtype):
    """A row is one tile, or several."""
    check_precision(on_gpu(CASES[name](width)), dtype, only_rounds=False)


@by_dtype
@pytest.mark.parametrize(("d", "rotated"), [(128, 128), (64, 16), (80, 32), (7, 4)])
@pytest.mark.parametrize("tables_per_sample", [False, True])
def test_rotary_precision(d, rotated, tables_per_sample, dtype):
    one = on_gpu(test_rotary.case("triton", 2, 5, 67, d, rotated, tables_per_sample=True))
    if not tables_per_sample:
        one = replace(one, aux={name: t[:1].expand_as(t) for name, t in one.aux.items()})
    check_precision(one, dtype, only_rounds=False)


@pytest.mark.parametrize("name", CASES)
def test_the_automatic_choice(name):
    op = CASES[name](8).name.removeprefix("add_")  # a norm of a sum has the norm's kernels
    assert backends.select(op, None, torch.ones(2, 8, device=DEVICE)).__name__ == f"gradmem_kernels.triton.{op}"
    double = torch.ones(2, 8, device=DEVICE, dtype=torch.float64)
    assert backends.select(op, None, double).__name__ == f"gradmem_kernels.reference.{op}"


@pytest.mark.parametrize("name", CASES)
def test_repeatable(name):
    """Sums over rows too, over more rows than there are programs."""
    many = on_gpu(CASES[name](256))
    check_determinism(replace(many, inputs=tuple(
        t.repeat(1, 40, 1) if t.dim() == 3 else t for t in many.inputs)).to(torch.bfloat16))


@pytest.mark.parametrize("op", ["swiglu", "gelu", "rms_norm"])
def test_tensors_beyond_two_to_the_31_elements(op):
    """The last row is right, so its address was."""
    width, rows = 4096, 2**19 + 3
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = torch.randn(width, device=DEVICE)
    run = {"swiglu": lambda x: swiglu(x, x), "gelu": gelu, "rms_norm": lambda x: rms_norm(x, x[-1])}[op]
    y = run(x)
    assert torch.equal(y[-1], run(x[-1:])[0])
    assert not y[:-1].any()


def test_graph_capture():
    """Both orders in one CUDA graph give, replayed on new inputs, the bits of plain calls."""
    x, x_t, weight, a, other = torch.randn(5, 256, 256, device=DEVICE).bfloat16().unbind(0)
    x, x_t, weight, other = x.clone().requires_grad_(), x_t.clone(), weight[0].clone().requires_grad_(), other.clone()

    def both_orders():
        y, y_t = rms_norm_dual(x, weight, x_t)
        return [y, y_t, *torch.autograd.grad((y, y_t), (x, weight), (a, a))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both_orders()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_orders()
    for given in (x.detach().clone(), other):
        with torch.no_grad():
            x.copy_(given)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [t.detach().clone() for t in captured]
        assert all(map(torch.equal, replayed, both_orders()))
