from __future__ import annotations

import pytest
import torch
from second_order import Case, check_empty, check_precision, every_check, narrow_dtypes, randn, refused

from gradmem_kernels.rms_norm import rms_norm, rms_norm_dual

OP = "rms_norm"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def case(backend, shape, eps=1e-6):
    def plain(x, weight):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    return Case(
        OP, plain=plain, inputs=(randn(*shape), randn(shape[-1])), active=(0,), batched=(True, False),
        op=lambda x, weight: rms_norm(x, weight, eps=eps, backend=backend),
        dual=lambda x, weight, x_t: rms_norm_dual(x, weight, x_t, eps=eps, backend=backend))


@every_check(
    one_row={"shape": (1, 5)},
    three_dims={"shape": (2, 3, 7)},
    large_eps={"shape": (3, 4), "eps": 0.5},
    width_1={"shape": (3, 1), "eps": 0.3})
def test_guarantees(check, options, backend):
    check(case(backend, **options))


@narrow_dtypes
def test_precision(dtype, backend):
    check_precision(case(backend, (4, 9, 65)), dtype)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0)])
def test_empty(shape, backend):
    check_empty(case(backend, shape))


def test_vector(backend):
    one = case(backend, (1, 5))
    x, weight = one.inputs
    assert torch.equal(rms_norm(x[0], weight, backend=backend), one.run_op(x, weight)[0])


def test_zero_row(backend):
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    y = rms_norm(x, torch.ones(4, dtype=torch.float64), eps=1e-6, backend=backend)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e3))


X, W = torch.ones(2, 3), torch.ones(3)


@pytest.mark.parametrize(("arguments", "argument", "expected", "got"), [
    ({"x": [1.0]}, "x", "a tensor", "list"),
    ({"x": torch.tensor(1.0)}, "x", "shape [..., D]", "[]"),
    ({"x": X.int()}, "x", "float64", "int32"),
    ({"weight": torch.ones(4)}, "weight", "D=3", "[4]"),
    ({"weight": torch.ones(1, 3)}, "weight", "D=3", "[1, 3]"),
    ({"weight": W.double()}, "weight", "the dtype of x, float32", "float64"),
    ({"weight": W.to("meta")}, "weight", "the device of x, cpu", "meta"),
    ({"eps": -1e-6}, "eps", ">= 0", "-1e-06"),
    ({"eps": float("nan")}, "eps", "finite", "nan"),
    ({"eps": "1"}, "eps", "a number", "str")])
def test_bad_arguments(arguments, argument, expected, got):
    arguments = {"x": X, "weight": W, **arguments}
    refused(lambda: rms_norm(**arguments), "rms_norm", argument, expected, got)
    refused(lambda: rms_norm_dual(**arguments, x_t=None), "rms_norm_dual", argument, expected, got)


@pytest.mark.parametrize(("x_t", "expected", "got"), [
    (1.0, "a tensor or None", "float"), (torch.ones(3), "[2, 3]", "[3]"), (X.double(), "float32", "float64")])
def test_bad_tangents(x_t, expected, got):
    refused(lambda: rms_norm_dual(X, W, x_t), "rms_norm_dual", "x_t", expected, got)
