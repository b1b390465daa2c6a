from __future__ import annotations

import math

import pytest
import torch
from second_order import Case, check_empty, check_precision, every_check, narrow_dtypes, randn, refused

from gradmem_kernels.gelu import gelu, gelu_dual

OP = "gelu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def case(backend, *shape, approximate="none"):
    def plain(x):
        if approximate == "none":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))

    return Case(
        OP, inputs=(2 * randn(*shape),), active=(0,), batched=(True,), plain=plain,
        op=lambda x: gelu(x, approximate=approximate, backend=backend),
        dual=lambda x, x_t: gelu_dual(x, x_t, approximate=approximate, backend=backend))


forms = pytest.mark.parametrize("approximate", ["none", "tanh"])


@forms
@every_check(one={"shape": (1,)}, rows={"shape": (2, 7)}, three_dims={"shape": (2, 3, 2)})
def test_guarantees(check, options, approximate, backend):
    check(case(backend, *options["shape"], approximate=approximate))


@forms
@narrow_dtypes
def test_precision(dtype, approximate, backend):
    check_precision(case(backend, 33, 65, approximate=approximate), dtype)


@forms
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
def test_empty(shape, approximate, backend):
    check_empty(case(backend, *shape, approximate=approximate))


@forms
def test_far_from_zero(approximate, backend):
    """No overflow where the slope is 0 or 1."""
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4], dtype=torch.float64, requires_grad=True)
    y = gelu(x, approximate=approximate, backend=backend)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    for actual, expected in ((y, [0.0, 0.0, 100.0, 1e4]), (slope, [0.0, 0.0, 1.0, 1.0]), (curvature, [0.0] * 4)):
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


X = torch.ones(2, 3)


@pytest.mark.parametrize(("arguments", "argument", "expected", "got"), [
    ({"x": 1.0}, "x", "a tensor", "float"),
    ({"x": X.long()}, "x", "float64", "int64"),
    ({"approximate": "erf"}, "approximate", "tanh", "erf"),
    ({"approximate": None}, "approximate", "none", "None")])
def test_bad_arguments(arguments, argument, expected, got):
    arguments = {"x": X, **arguments}
    refused(lambda: gelu(**arguments), "gelu", argument, expected, got)
    refused(lambda: gelu_dual(**arguments, x_t=None), "gelu_dual", argument, expected, got)


def test_bad_tangent():
    refused(lambda: gelu_dual(X, X[0]), "gelu_dual", "x_t", "[2, 3]", "[3]")
