from __future__ import annotations

import math

import pytest
import torch
from second_order import refused

from gradmem_kernels.checks import ArgumentError, Checker, check_values

X = torch.ones(2, 3, 4)


def checker():
    check = Checker("op")
    check.tensor("x", X, ("B", "S", "D"))
    return check


@pytest.mark.parametrize(("value", "dims", "expected", "got"), [
    ("abc", ("D",), "a tensor", "str"),
    (torch.ones(4, 3), ("D", "S", "1"), "shape [D=4, S=3, 1]", "[4, 3]"),
    (torch.ones(4, 4), ("D", "S"), "shape [D=4, S=3]", "[4, 4]"),
    (torch.ones(5, 6), ("N", "N"), "shape [N, N]", "[5, 6]"),
    (torch.tensor(1.0), ("...", "N"), "shape [..., N]", "[]"),
    (torch.ones(7, 2, 3), ("...", "D"), "shape [..., D=4]", "[7, 2, 3]"),
    (torch.ones(3, 2), ("B", "..."), "shape [B=2, ...]", "[3, 2]"),
    (torch.ones(4, dtype=torch.int64), ("D",), "float64, float32, bfloat16, float16", "int64"),
    (torch.ones(4, dtype=torch.complex64), ("D",), "float64", "complex64"),
    (torch.ones(4).double(), ("D",), "the dtype of x, float32", "float64; cast one of them"),
    (torch.ones(4, device="meta"), ("D",), "the device of x, cpu", "meta; move one of them")])
def test_tensor(value, dims, expected, got):
    refused(lambda: checker().tensor("weight", value, dims), "op", "weight", expected, got)


def test_tensor_of_given_dtypes():
    labels = torch.zeros(2, dtype=torch.int64)
    assert checker().tensor("labels", labels, ("B",), dtypes=(torch.int64,)) is labels
    refused(lambda: checker().tensor("labels", labels.int(), ("B",), dtypes=(torch.int64, torch.uint8)), "op", "labels",
            "dtype int64 or uint8", "int32")
    refused(lambda: checker().tensor("labels", labels.to("meta"), ("B",), dtypes=(torch.int64,)), "op", "labels",
            "the device of x", "meta")


def test_leading_dimensions_are_free():
    check = checker()
    for shape in ((4,), (9, 4), (5, 0, 4)):
        check.tensor("y", torch.ones(shape), ("...", "D"))
    check.tensor("z", torch.tensor(1.0), ("...",))


def test_the_remedy_comes_last():
    with pytest.raises(ArgumentError, match=r"^op: y: expected a tensor, got int; embed the tokens first$"):
        checker().tensor("y", 1, ("B",), remedy="embed the tokens first")


def test_an_argument_error_is_a_value_error():
    assert issubclass(ArgumentError, ValueError)


@pytest.mark.parametrize(("value", "got"), [
    (2.0, "float"), (torch.ones(2, 3), "shape [2, 3]"), (X.double(), "float64"), (X.to("meta"), "on meta")])
def test_tangent(value, got):
    checker().tangent("x_t", None, X)
    checker().tangent("x_t", X.clone(), X)
    refused(lambda: checker().tangent("x_t", value, X), "op", "x_t", "a tensor or None" if got == "float" else
            "shape [2, 3, 4], float32, on cpu", got)


def test_same_shape():
    checker().same_shape("up", X.double(), "x", X)
    refused(lambda: checker().same_shape("up", X[0], "x", X), "op", "up", "the shape of x, [2, 3, 4]", "[3, 4]")


@pytest.mark.parametrize(("value", "bounds", "expected", "got"), [
    (True, {}, "a number", "bool"), ("1", {}, "a number", "str"), (None, {}, "a number", "NoneType"),
    (math.nan, {}, "a finite number", "nan"), (math.inf, {}, "a finite number", "inf"),
    (-1, {"minimum": 0.0}, "a finite number >= 0", "-1"), (0.0, {"above": 0.0}, "a finite number > 0", "0.0")])
def test_number(value, bounds, expected, got):
    refused(lambda: checker().number("lr", value, **bounds), "op", "lr", expected, got)


def test_numbers_at_their_bounds():
    checker().number("lr", 0, minimum=0.0)
    checker().number("lr", 1e-300, above=0.0)
    checker().number("lr", -5)


@pytest.mark.parametrize("value", [1, None, torch.tensor(True)])
def test_boolean(value):
    checker().boolean("causal", False)
    refused(lambda: checker().boolean("causal", value), "op", "causal", "True or False", f"{value}")


def test_values_are_looked_at_where_it_costs_no_sync(monkeypatch):
    seen = []

    def look(t):
        seen.append(check_values(t))
        return t

    look(X)
    torch.func.vmap(look)(X)
    torch.func.grad(lambda t: look(t).sum())(X)
    monkeypatch.delenv("GRADMEM_DEBUG", raising=False)
    look(X.to("meta"))
    monkeypatch.setenv("GRADMEM_DEBUG", "0")
    look(X.to("meta"))
    monkeypatch.setenv("GRADMEM_DEBUG", "1")
    look(X.to("meta"))
    torch.func.vmap(look)(X)
    assert seen == [True, False, False, False, False, True, False]
