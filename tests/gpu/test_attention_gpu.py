"""Attention on a GPU: every shipped configuration, every option, and what only a GPU can show.

The kernels themselves have their tests in tests/test_attention.py, in Triton's interpreter, which knows no bfloat16, no
streams and no long sequences. The checks are in attention_checks.py and are tested on the CPU.
"""

import contextlib

import pytest
import torch
from attention_checks import (
    FEATURES,
    Call,
    check_batch,
    check_errors,
    check_memory,
    check_repeatable,
    feature,
    ours,
    results,
    same_bits,
)

from benchmarks.attention import peak_bytes
from gradmem_kernels import attention
from gradmem_kernels.triton.attention_configs import CONFIGS, DTYPES, HEAD_DIMS, KERNELS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory"),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
HOW = {"backend": "triton", "first_order": "own"}
CAUSAL = {"causal": True}
#: Dtype, the precision of float32 matrix products, and the rounding unit of their factors.
PRECISIONS = {"bfloat16": (torch.bfloat16, "highest", 2**-7), "float16": (torch.float16, "highest", 2**-10),
              "float32": (torch.float32, "highest", 2**-23), "tf32": (torch.float32, "high", 2**-10)}


@pytest.fixture(params=PRECISIONS)
def precision(request):
    """The dtype and the rounding unit; float32 products are of this precision meanwhile."""
    dtype, products, unit = PRECISIONS[request.param]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    yield dtype, unit
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_config(head_dim, precision, monkeypatch):
    """Every entry of the table for this architecture runs, and is right."""
    from gradmem_kernels.triton import attention as launched
    from gradmem_kernels.triton.common import architecture

    dtype, unit = precision
    used = set()

    def choose(*args):
        used.add(args[0])
        return chosen(*args)

    chosen = launched.choose
    monkeypatch.setattr(launched, "choose", choose)
    check_errors(Call(d=head_dim, lengths=(321, 321), dtype=dtype, options=CAUSAL), DEVICE, unit, **HOW)
    assert used == set(KERNELS)
    here = {key for key in CONFIGS if key.architecture == architecture(torch.empty(0, device=DEVICE))}
    assert {key.head_dim for key in here} <= set(HEAD_DIMS)
    assert {key.dtype for key in here} <= set(DTYPES)


@pytest.mark.parametrize("length", [1, 17, 128, 1000, 4096])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lengths(head_dim, length, precision):
    dtype, unit = precision
    heads = (4, 2) if length < 4096 else (2, 1)
    call = Call(batch=1, heads=heads, lengths=(length, length), d=head_dim, dtype=dtype, options=CAUSAL)
    check_errors(call, DEVICE, unit, **HOW)


def test_a_long_sequence():
    check_errors(Call(batch=1, heads=(1, 1), lengths=(8192, 8192), dtype=torch.bfloat16, options=CAUSAL), DEVICE, **HOW)


@pytest.mark.parametrize("head_dim", [16, 40, 80, 96])
def test_head_dims(head_dim, precision):
    dtype, unit = precision
    check_errors(Call(d=head_dim, dtype=dtype, options=CAUSAL), DEVICE, unit, **HOW)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, dtype):
    check_errors(feature(name, dtype=dtype), DEVICE, **HOW)


@pytest.mark.parametrize("first_order", [None, "flash", "cudnn"])
@pytest.mark.parametrize("name", ["full", "causal", "heads_alone"])
def test_first_order_of_vendors(name, first_order):
    """``first_order=None`` without a backend's name is what a user gets."""
    check_errors(feature(name, dtype=torch.bfloat16), DEVICE, first_order=first_order)


@pytest.mark.parametrize("name", ["causal", "packed", "dropout", "everything"])
def test_repeatable(name):
    check_repeatable(feature(name, dtype=torch.bfloat16), DEVICE, **HOW)


@pytest.mark.parametrize("length", [128, 1000])
def test_samples_do_not_depend_on_their_batch(length):
    call = Call(batch=3, lengths=(length, length), dtype=torch.bfloat16, options=CAUSAL)
    check_batch(call, DEVICE, **HOW)


def test_memory_is_linear():
    call = Call(batch=1, heads=(4, 4), dtype=torch.bfloat16, options=CAUSAL)
    check_memory(call, DEVICE, (1024, 2048, 4096, 8192, 16384), lambda work: peak_bytes(lambda: work, DEVICE), **HOW)


def test_a_stream_of_its_own():
    """Kernels run on the current stream: behind what fills their inputs there."""
    call = feature("causal", dtype=torch.bfloat16)
    data, f = call.data(DEVICE), ours(call, DEVICE, **HOW)
    expected = results(f, data)
    late = data.map(torch.zeros_like)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        for to, of in zip((*late.x, *late.x_t, late.a, late.b), (*data.x, *data.x_t, data.a, data.b), strict=True):
            to.copy_(of)
        actual = results(f, late)
    torch.cuda.synchronize()
    same_bits(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none")
@pytest.mark.parametrize("current", [0, 1])
def test_a_second_device(current):
    """Kernels run where their tensors are, whatever device is current."""
    call = feature("causal", dtype=torch.bfloat16)
    with torch.cuda.device(current):
        check_errors(call, "cuda:1", **HOW)


def test_graph_capture():
    """Forward, backward and double backward in one CUDA graph give, replayed on new inputs, the bits of plain calls."""
    call = feature("causal", dtype=torch.bfloat16)
    data, other = call.data(DEVICE), call.data(DEVICE).map(lambda t: t.flip(2).contiguous())
    x, do = [t.clone().requires_grad_() for t in data.x], data.b.clone().requires_grad_()
    x_t = [t.clone() for t in data.x_t]

    def both_orders():
        o = attention(*x, **CAUSAL, **HOW)
        first = torch.autograd.grad(o, x, do, create_graph=True)
        return [o, *first, *torch.autograd.grad(first, (*x, do), x_t)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both_orders()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_orders()
    for given in (data, other):
        with torch.no_grad():
            for to, of in zip((*x, do, *x_t), (*given.x, given.b, *given.x_t), strict=True):
                to.copy_(of)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [t.detach().clone() for t in captured]
        assert all(map(torch.equal, replayed, both_orders()))


@pytest.mark.parametrize("name", ["full", "causal"])
def test_calls_do_not_synchronize(name):
    """No call waits for the GPU."""
    call = feature(name, dtype=torch.bfloat16)
    data, f = call.data(DEVICE), ours(call, DEVICE, **HOW)
    results(f, data)
    with _no_synchronization():
        results(f, data)


@contextlib.contextmanager
def _no_synchronization():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
