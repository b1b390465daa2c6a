from __future__ import annotations

import pytest
import torch
from second_order import Case, check_empty, check_precision, every_check, narrow_dtypes, randn, refused

from gradmem_kernels.layer_norm import layer_norm, layer_norm_dual

OP = "layer_norm"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def case(backend, shape, bias=True, eps=1e-5):
    def plain(x, weight, bias=None):
        centred = x - x.mean(-1, keepdim=True)
        y = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight
        return y if bias is None else y + bias

    def dual(x, weight, *bias_and_tangent):
        *bias, x_t = bias_and_tangent
        return layer_norm_dual(x, weight, x_t, bias=bias[0] if bias else None, eps=eps, backend=backend)

    inputs = randn(*shape), randn(shape[-1]), randn(shape[-1])
    return Case(
        OP, plain=plain, dual=dual, inputs=inputs[: 2 + bias], active=(0,), batched=(True, False, False)[: 2 + bias],
        op=lambda x, weight, bias=None: layer_norm(x, weight, bias=bias, eps=eps, backend=backend))


@every_check(
    one_row={"shape": (1, 5)},
    three_dims={"shape": (2, 3, 5)},
    no_bias={"shape": (3, 4), "bias": False},
    large_eps={"shape": (3, 4), "eps": 0.5},
    width_1={"shape": (3, 1), "eps": 0.3})
def test_guarantees(check, options, backend):
    check(case(backend, **options))


@narrow_dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_precision(dtype, bias, backend):
    check_precision(case(backend, (4, 9, 65), bias), dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0)], ids=str)
def test_empty(shape, bias, backend):
    check_empty(case(backend, shape, bias))


def test_vector(backend):
    one = case(backend, (1, 5))
    x, weight, bias = one.inputs
    assert torch.equal(layer_norm(x[0], weight, bias=bias, backend=backend), one.run_op(x, weight, bias)[0])


def test_constant_rows(backend):
    """Their variance is 0: ``y = bias``, and the gradient is ``(g - mean(g)) / sqrt(eps)``."""
    x = torch.full((2, 4), 3.0, dtype=torch.float64, requires_grad=True)
    weight, bias, g = torch.ones(4).double(), randn(4), randn(2, 4)
    y = layer_norm(x, weight, bias=bias, eps=1e-4, backend=backend)
    (dx,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(y, bias.expand(2, 4))
    torch.testing.assert_close(dx, (g - g.mean(-1, keepdim=True)) * 100)


def test_a_large_mean_costs_no_precision(backend):
    """The variance is computed from centred values, not as ``E x^2 - (E x)^2``."""
    x = torch.randn(3, 64)
    actual = layer_norm(x + 4096.0, torch.ones(64), backend=backend)
    exact = torch.nn.functional.layer_norm((x + 4096.0).double(), (64,))
    assert (actual - exact).abs().max() < 2e-3


X, W = torch.ones(2, 3), torch.ones(3)


@pytest.mark.parametrize(("arguments", "argument", "expected", "got"), [
    ({"x": [1.0]}, "x", "a tensor", "list"),
    ({"x": torch.tensor(1.0)}, "x", "shape [..., D]", "[]"),
    ({"x": X.int()}, "x", "float64", "int32"),
    ({"weight": torch.ones(4)}, "weight", "D=3", "[4]"),
    ({"weight": W.double()}, "weight", "the dtype of x, float32", "float64"),
    ({"weight": W.to("meta")}, "weight", "the device of x, cpu", "meta"),
    ({"bias": torch.ones(2)}, "bias", "D=3", "[2]"),
    ({"bias": 0.0}, "bias", "a tensor", "float"),
    ({"bias": W.half()}, "bias", "the dtype of x, float32", "float16"),
    ({"eps": -1e-6}, "eps", ">= 0", "-1e-06"),
    ({"eps": float("inf")}, "eps", "finite", "inf")])
def test_bad_arguments(arguments, argument, expected, got):
    arguments = {"x": X, "weight": W, **arguments}
    refused(lambda: layer_norm(**arguments), "layer_norm", argument, expected, got)
    refused(lambda: layer_norm_dual(**arguments, x_t=None), "layer_norm_dual", argument, expected, got)


def test_bad_tangent():
    refused(lambda: layer_norm_dual(X, W, torch.ones(3)), "layer_norm_dual", "x_t", "[2, 3]", "[3]")
