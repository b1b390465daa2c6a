from __future__ import annotations

import pytest
import torch
from second_order import (
    Case,
    check_dual,
    check_empty,
    check_needs,
    check_precision,
    check_values,
    every_check,
    narrow_dtypes,
    randn,
    refused,
)

from gradmem_kernels.reference import swiglu as reference
from gradmem_kernels.swiglu import swiglu, swiglu_dual

OP = "swiglu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def case(backend, *shape):
    return Case(
        OP, inputs=(2 * randn(*shape), randn(*shape)), active=(0, 1), batched=(True, True),
        plain=lambda gate, up: gate / (1 + torch.exp(-gate)) * up,
        op=lambda gate, up: swiglu(gate, up, backend=backend),
        dual=lambda *x: swiglu_dual(*x, backend=backend))


@every_check(one={"shape": (1,)}, rows={"shape": (2, 7)}, three_dims={"shape": (2, 3, 2)})
def test_guarantees(check, options, backend):
    check(case(backend, *options["shape"]))


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_samples_at_a_time(at_a_time, monkeypatch):
    """However many samples the reference kernels work on at once, the results are the same."""
    monkeypatch.setattr(reference, "ELEMENTS", at_a_time * 4)
    for check in (check_values, check_dual, check_needs):
        check(case("reference", 3, 4))


@narrow_dtypes
def test_precision(dtype, backend):
    check_precision(case(backend, 33, 65), dtype)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
def test_empty(shape, backend):
    check_empty(case(backend, *shape))


def test_far_from_zero(backend):
    """No overflow where sigmoid is 0 or 1."""
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4], dtype=torch.float64, requires_grad=True)
    y = swiglu(gate, torch.ones_like(gate), backend=backend)
    (slope,) = torch.autograd.grad(y.sum(), gate, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), gate)
    for actual, expected in ((y, [0.0, 0.0, 100.0, 1e4]), (slope, [0.0, 0.0, 1.0, 1.0]), (curvature, [0.0] * 4)):
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


X = torch.ones(2, 3)


@pytest.mark.parametrize(("arguments", "argument", "expected", "got"), [
    ({"gate": 1.0}, "gate", "a tensor", "float"),
    ({"gate": X.bool()}, "gate", "float64", "bool"),
    ({"up": torch.ones(3)}, "up", "the shape of gate, [2, 3]", "[3]"),
    ({"up": X.bfloat16()}, "up", "the dtype of gate, float32", "bfloat16"),
    ({"up": X.to("meta")}, "up", "the device of gate, cpu", "meta")])
def test_bad_arguments(arguments, argument, expected, got):
    arguments = {"gate": X, "up": X, **arguments}
    refused(lambda: swiglu(**arguments), "swiglu", argument, expected, got)
    refused(lambda: swiglu_dual(**arguments, gate_t=None, up_t=None), "swiglu_dual", argument, expected, got)


@pytest.mark.parametrize("argument", ["gate_t", "up_t"])
def test_bad_tangents(argument):
    tangents = {"gate_t": None, "up_t": None, argument: X.double()}
    refused(lambda: swiglu_dual(X, X, **tangents), "swiglu_dual", argument, "float32", "float64")
