"""Ops on rows in C++, beyond what every backend is asked: many tasks, threads, instruction sets."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from second_order import assert_close

from gradmem_kernels import backend as backends
from gradmem_kernels.native.common import refusal
from gradmem_kernels.rotary import rotary_tables

missing = refusal(None)
pytestmark = [pytest.mark.skipif(missing is not None, reason=str(missing)), pytest.mark.usefixtures("poisoned_memory")]

#: Rows that make several tasks, whose last vector is not full; and rows of more than one task.
SHAPES = {"rows": (5, 60, 133), "wide": (3, 40001), "narrow": (20001, 3)}
#: Op, options, whether each input has a row for each of x.
OPS = {
    "rms_norm": ("rms_norm", {"eps": 1e-5}, (True, False)),
    "layer_norm": ("layer_norm", {"eps": 1e-5}, (True, False, False)),
    "swiglu": ("swiglu", {}, (True, True)),
    "gelu": ("gelu", {"approximate": "none"}, (True,)),
    "gelu_tanh": ("gelu", {"approximate": "tanh"}, (True,))}
every_op = pytest.mark.parametrize("op", OPS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def tensors(op, shape, dtype=torch.float64):
    """``x, x_t, a, b`` of an op."""
    of_rows = OPS[op][2]

    def like_x():
        return tuple(torch.randn(shape if rows else shape[-1:], dtype=torch.float64).to(dtype) for rows in of_rows)

    return like_x(), like_x(), *torch.randn(2, *shape, dtype=torch.float64).to(dtype).unbind(0)


def everything(op, x, x_t, a, b, backend="native"):
    """All results of all kernels in one call of each."""
    name, options, _ = OPS[op]
    kernels = backends.select(name, backend, *x)
    every = (True,) * len(x)
    y, saved = kernels.forward(x, (), **options)
    out = {"forward": (*y, *saved), "backward": kernels.backward(x, (), y, saved, (b,), every, **options)}
    y, y_t, saved = kernels.dual_forward(x, (), x_t, **options)
    bars = kernels.dual_backward(x, (), x_t, y, y_t, saved, (a,), (b,), every, every, **options)
    out |= {"dual_forward": (*y, *y_t, *saved), "dual_backward": (*bars[0], *bars[1])}
    if "norm" in op:
        options = {**options, "residual": a}
        y, saved = kernels.forward(x, (), **options)
        out["add forward"] = (*y, *saved)
        y, y_t, saved = kernels.dual_forward(x, (), x_t, residual_t=b, **options)
        sums, bar, options = (y[1], *x[1:]), (b, a), OPS[op][1]
        bars = kernels.dual_backward(sums, (), (y_t[1], *x_t[1:]), y, y_t, saved, (a, b), bar, every, every, **options)
        out |= {"add dual_forward": (*y, *y_t, *saved), "add dual_backward": (*bars[0], *bars[1])}
    if backend == "native":
        # the reference has it by the dual pair alone
        bars, y_t = kernels.double_backward(x, (), x_t, y, saved, (b,), every, **OPS[op][1])
        out["double_backward"] = (*bars, *y_t)
    return {f"{kernel} {i}": t for kernel, results in out.items() for i, t in enumerate(results)}


def turned(x, cos, sin, backend="native"):
    kernels = backends.select("rotary", backend, x)
    return {"forward": kernels.forward(x, cos, sin), "transpose": kernels.transpose(x, cos, sin)}


def rotary_arguments(dtype=torch.float64, shape=(2, 3, 500, 38), rotated=34):
    tables = rotary_tables(torch.arange(shape[0] * shape[2]).view(shape[0], -1), rotated,
                           dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return torch.randn(shape, dtype=torch.float64).to(dtype).transpose(1, 2).contiguous().transpose(1, 2), *tables


@contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    from gradmem_kernels.native import _cpu

    before = _cpu.instruction_set()
    _cpu.use(isa)
    try:
        yield
    finally:
        _cpu.use(before)


def on_threads(run):
    """The results of ``run()`` on several numbers of threads, each the same to the bit."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(t, other[name]) for name, t in results[0].items())


def close(found, expected, dtype):
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 0.03}[dtype]
    for name, t in found.items():
        if name in expected:
            scale = max(1.0, expected[name].abs().max().item())
            torch.testing.assert_close(t.double(), expected[name].double(), rtol=0, atol=tolerance * scale, msg=name)


@every_op
@every_shape
def test_many_tasks(op, shape):
    arguments = tensors(op, shape)
    ours, expected = everything(op, *arguments), everything(op, *arguments, "reference")
    assert_close({name: ours[name] for name in expected}, expected)


def test_many_positions():
    arguments = rotary_arguments()
    assert_close(turned(*arguments), turned(*arguments, "reference"))


@every_op
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(op, shape, dtype):
    arguments = tensors(op, shape, dtype)
    on_threads(lambda: everything(op, *arguments))


def test_bits_of_rotary_do_not_depend_on_threads():
    arguments = rotary_arguments(torch.float32)
    on_threads(lambda: turned(*arguments))


@every_op
def test_bits_of_a_row_do_not_depend_on_the_batch(op):
    x, x_t, a, b = tensors(op, (200, 133), torch.float32)
    whole = everything(op, x, x_t, a, b)
    some = slice(77, 82)
    x, x_t = (tuple(t[some] if t.dim() > 1 else t for t in group) for group in (x, x_t))
    part = everything(op, x, x_t, a[some], b[some])
    for name, t in part.items():
        if t.dim() > 1:
            assert torch.equal(t, whole[name][some]), name


@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_instruction_set(op, dtype):
    from gradmem_kernels.native import _cpu

    arguments = tensors(op, (3, 60, 133), dtype)
    x, x_t, a, b = arguments
    expected = everything(op, *(tuple(t.double() for t in group) for group in (x, x_t)), a.double(), b.double(),
                          "reference")
    assert "baseline" in _cpu.instruction_sets()
    for isa in _cpu.instruction_sets():
        with instruction_set(isa):
            close(everything(op, *arguments), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_instruction_set_of_rotary(dtype):
    from gradmem_kernels.native import _cpu

    x, cos, sin = rotary_arguments(dtype)
    expected = turned(x.double(), cos.double(), sin.double(), "reference")
    for isa in _cpu.instruction_sets():
        with instruction_set(isa):
            close(turned(x, cos, sin), expected, dtype)


@pytest.mark.parametrize(("dtype", "ulps"), [(torch.float64, 4), (torch.float32, 4)], ids=str)
def test_tail_of_the_normal_law(dtype, ulps):
    """gelu(x) = x * Phi(x) keeps its digits far below zero, but for those that x^2 costs the exponential."""
    mpmath = pytest.importorskip("mpmath")
    x = torch.cat((torch.linspace(-12, 6, 901, dtype=dtype), torch.tensor([-1e-30, 0.0, 1e-30, 40.0], dtype=dtype)))
    (y,), _ = backends.select("gelu", "native", x).forward((x,), (), approximate="none")
    with mpmath.workdps(40):
        for value, found in zip(x.tolist(), y.tolist(), strict=True):
            exact = value * mpmath.erfc(-mpmath.mpf(value) / mpmath.sqrt(2)) / 2
            allowed = (ulps + value * value) * torch.finfo(dtype).eps
            assert abs(found - exact) <= allowed * abs(exact) + torch.finfo(dtype).tiny, value


def test_infinite_and_missing_values():
    nan, inf = math.nan, math.inf
    x = torch.tensor([nan, inf, -1e30, 1e30, -0.0])
    for approximate in ("none", "tanh"):
        (y,), _ = backends.select("gelu", "native", x).forward((x,), (), approximate=approximate)
        torch.testing.assert_close(y, torch.tensor([nan, inf, 0.0, 1e30, 0.0]), equal_nan=True)
    one = torch.ones_like(x)
    (y,), _ = backends.select("swiglu", "native", x).forward((x, one), ())
    torch.testing.assert_close(y, torch.tensor([nan, inf, 0.0, 1e30, 0.0]), equal_nan=True)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_a_large_mean_stays_in_its_row(op):
    """What lies beyond the end of a row, which is no whole vector, becomes infinite."""
    x, weights = torch.full((2, 5), 2.0**123), torch.ones(2, 5).unbind(0)[: len(OPS[op][2]) - 1]
    options, every = OPS[op][1], (True,) * len(OPS[op][2])
    found = {}
    for backend in ("native", "reference"):
        kernels = backends.select(op, backend, x)
        y, saved = kernels.forward((x, *weights), (), **options)
        found[backend] = kernels.backward((x, *weights), (), y, saved, (torch.ones_like(x),), every, **options)
    assert all(map(torch.equal, found["native"], found["reference"]))


def operators(op):
    """Those of PyTorch that run native kernels, which a call of the op would make."""
    importlib.import_module(f"gradmem_kernels.native.{op}")
    return torch.ops.gradmem


@pytest.mark.parametrize("order", ["forward", "dual_forward", "backward", "dual_backward", "double_backward"])
def test_opcheck_of_norms(order):
    """Schema, fake kernels and dispatch of the operators are right."""
    (x, x_t, a, b, r), (w, w_t, c, c_t) = torch.randn(5, 2, 3).unbind(0), torch.randn(4, 3).unbind(0)
    if order.endswith("forward"):
        tangents = (x_t, w_t, None) if order == "dual_forward" else (None,) * 3
        torch.library.opcheck(operators("rms_norm").native_norm_forward.default,
                              (x, w, c, *tangents, r, None, 1e-5, True))
        return
    rstd, mean = torch.rand(2, 2, 1).unbind(0)
    dual = order != "backward"
    torch.library.opcheck(
        operators("rms_norm").native_norm_backward.default,
        (x, w, *((x_t, w_t, c_t) if dual else (None,) * 3), rstd, mean, a if order == "dual_backward" else None, b,
         None, None, [dual, order == "dual_backward"], order == "double_backward", [dual, dual, not dual, not dual]))


@pytest.mark.parametrize("order", ["forward", "dual_forward", "backward", "dual_backward", "double_backward"])
def test_opcheck_of_activations(order):
    gate, up, gate_t, up_t, a, b = torch.randn(6, 2, 3).unbind(0)
    if order.endswith("forward"):
        tangents = (gate_t, None) if order == "dual_forward" else (None, None)
        torch.library.opcheck(operators("swiglu").native_activation_forward.default, (gate, up, *tangents, "silu"))
        return
    dual = order != "backward"
    torch.library.opcheck(
        operators("swiglu").native_activation_backward.default,
        (gate, up, *((gate_t, up_t) if dual else (None, None)), a if order == "dual_backward" else None, b,
         [dual, dual], [order != "double_backward", False], order == "double_backward", "silu"))


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_rotary(transposed):
    x, tables = torch.randn(2, 3, 2, 5), torch.randn(2, 3, 2)
    torch.library.opcheck(operators("rotary").native_rotary.default, (x.transpose(1, 2), *tables.unbind(0), transposed))
