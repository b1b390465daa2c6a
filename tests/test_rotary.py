from __future__ import annotations

import pytest
import torch
from second_order import (
    CHECKS,
    Case,
    assert_close,
    check_empty,
    check_last_derivative,
    check_needs,
    check_precision,
    every_check,
    narrow_dtypes,
    randn,
    refused,
)

from gradmem_kernels.rotary import rotary, rotary_dual, rotary_tables

OP = "rotary"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def plain(x, cos, sin):
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    half = cos.shape[-1]
    z = torch.stack((x[..., :half], x[..., half : 2 * half]), -1)
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2).to(x.dtype)
    turned = (turn @ z[..., None])[..., 0]
    return torch.cat((turned[..., 0], turned[..., 1], x[..., 2 * half :]), -1)


def case(backend, batch, heads, length, d, rotated, tables_per_sample=False):
    positions = torch.randint(0, 50, (batch, length) if tables_per_sample else (length,))
    tables = dict(zip(("cos", "sin"), rotary_tables(positions, rotated, dtype=torch.float64), strict=True))

    def with_tables(f):
        return f if tables_per_sample else lambda *x: f(*x, **{name: t.to(x[0].dtype) for name, t in tables.items()})

    return Case(
        OP, inputs=(randn(batch, heads, length, d),), active=(0,), batched=(True,),
        aux=tables if tables_per_sample else {}, plain=with_tables(plain),
        op=with_tables(lambda x, cos, sin: rotary(x, cos, sin, backend=backend)),
        dual=with_tables(lambda x, x_t, cos, sin: rotary_dual(x, cos, sin, x_t, backend=backend)))


@every_check(
    # the op is linear in its only input: derivatives of every order exist
    checks=[check for check in CHECKS if check not in (check_last_derivative, check_needs)],
    full={"batch": 2, "heads": 2, "length": 3, "d": 4, "rotated": 4},
    partial={"batch": 1, "heads": 1, "length": 3, "d": 7, "rotated": 4},
    tables_per_sample={"batch": 2, "heads": 2, "length": 2, "d": 5, "rotated": 2, "tables_per_sample": True},
    nothing_rotated={"batch": 2, "heads": 1, "length": 2, "d": 3, "rotated": 0})
def test_guarantees(check, options, backend):
    check(case(backend, **options))


@narrow_dtypes
def test_precision(dtype, backend):
    check_precision(case(backend, 2, 3, 9, 24, 16, tables_per_sample=True), dtype)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 4), (2, 0, 3, 4, 2), (2, 1, 0, 4, 4), (2, 1, 3, 0, 0)], ids=str)
@pytest.mark.parametrize("tables_per_sample", [False, True])
def test_empty(shape, tables_per_sample, backend):
    check_empty(case(backend, *shape, tables_per_sample))


def test_every_order(backend):
    """Third and fourth derivatives of ``sum(rotary(x)^4)``."""
    one = case(backend, 1, 1, 2, 4, 4)

    def fourth_derivative(f):
        x, orders = one.inputs[0].requires_grad_(), {}
        y = (f(x) ** 4).sum()
        for order in range(1, 5):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            orders[f"order {order}"], y = g.detach(), (g * torch.arange(1.0, 5.0)).sum()
        return orders

    assert_close(fourth_derivative(one.run_op), fourth_derivative(one.run_plain))


def test_float32_tables_beside_half_precision(backend):
    cos, sin = rotary_tables(torch.arange(100, 120), 8)
    x = torch.randn(2, 3, 20, 8).bfloat16()
    actual = rotary(x, cos, sin, backend=backend)
    assert torch.equal(actual, plain(x.float(), cos, sin).bfloat16())


def test_scores_depend_on_distance_only(backend):
    q, k = randn(1, 1, 1, 6), randn(1, 1, 1, 6)

    def score(i, j):
        return (rotary(q, *rotary_tables(torch.tensor([i]), 6, dtype=torch.float64), backend=backend)
                * rotary(k, *rotary_tables(torch.tensor([j]), 6, dtype=torch.float64), backend=backend)).sum()

    torch.testing.assert_close(score(3, 1), score(1003, 1001))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tables(dtype):
    positions = torch.tensor([[0, 1, 5], [2, 100_000, 7]])
    cos, sin = rotary_tables(positions, 4, theta=100.0, dtype=dtype)
    angle = positions[..., None].double() * torch.tensor([1.0, 0.1], dtype=torch.float64)
    for table, expected in ((cos, angle.cos()), (sin, angle.sin())):
        assert table.dtype == dtype
        torch.testing.assert_close(table, expected.to(dtype))
    assert torch.equal(rotary_tables(positions.float(), 4)[0], rotary_tables(positions, 4)[0])


X, T = torch.ones(2, 1, 3, 5), torch.ones(3, 2)


@pytest.mark.parametrize(("arguments", "argument", "expected", "got"), [
    ({"x": X[0]}, "x", "shape [B, H, S, d]", "[1, 3, 5]"),
    ({"x": X.int()}, "x", "float64", "int32"),
    ({"cos": None}, "cos", "a tensor", "NoneType"),
    ({"cos": T[0]}, "cos", "S=3", "[2]"),
    ({"cos": T[:2]}, "cos", "S=3", "[2, 2]"),
    ({"cos": T.expand(3, 3, 2)}, "cos", "B=2", "[3, 3, 2]"),
    ({"cos": torch.ones(3, 3), "sin": torch.ones(3, 3)}, "cos", "d=5", "[3, 3]"),
    ({"cos": T.double()}, "cos", "float32", "float64"),
    ({"cos": T.clone().requires_grad_()}, "cos", "a constant", "differentiated"),
    ({"sin": T.clone().requires_grad_()}, "sin", "a constant", "differentiated"),
    ({"sin": torch.ones(3, 1)}, "sin", "r/2=2", "[3, 1]"),
    ({"sin": T.expand(2, 3, 2)}, "sin", "[S=3, r/2=2]", "[2, 3, 2]"),
    ({"sin": T.to("meta")}, "sin", "the device of x, cpu", "meta"),
    ({"x": X.half(), "sin": T.half()}, "sin", "the dtype of cos", "float16")])
def test_bad_arguments(arguments, argument, expected, got):
    arguments = {"x": X, "cos": T, "sin": T, **arguments}
    refused(lambda: rotary(**arguments), "rotary", argument, expected, got)
    refused(lambda: rotary_dual(**arguments, x_t=None), "rotary_dual", argument, expected, got)


def test_tables_are_constants_in_forward_mode_too():
    for argument in (1, 2):
        primals, tangents = (X, T, T), tuple(torch.ones_like(t) if i == argument else torch.zeros_like(t)
                                             for i, t in enumerate((X, T, T)))
        refused(lambda p=primals, t=tangents: torch.func.jvp(rotary, p, t), "rotary", "cos", "a constant",
                "differentiated")
        refused(lambda p=primals, i=argument: torch.func.grad(lambda *x: rotary(*x).sum(), i)(*p), "rotary",
                ("x", "cos", "sin")[argument], "a constant", "differentiated")


def test_bad_tangent():
    refused(lambda: rotary_dual(X, T, T, X.double()), "rotary_dual", "x_t", "float32", "float64")


@pytest.mark.parametrize(("arguments", "argument", "expected", "got"), [
    ({"positions": [0, 1]}, "positions", "a tensor", "list"),
    ({"positions": torch.tensor(1)}, "positions", "[..., S]", "[]"),
    ({"positions": torch.tensor([True])}, "positions", "int64", "bool"),
    ({"dim": 3}, "dim", "an even int", "3"),
    ({"dim": 4.0}, "dim", "an even int", "4.0"),
    ({"theta": 0.0}, "theta", "> 0", "0.0"),
    ({"dtype": torch.int32}, "dtype", "floating", "int32")])
def test_bad_table_arguments(arguments, argument, expected, got):
    arguments = {"positions": torch.arange(2), "dim": 4, **arguments}
    refused(lambda: rotary_tables(**arguments), "rotary_tables", argument, expected, got)
