from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from second_order import (
    Case,
    check_dual,
    check_empty,
    check_precision,
    check_values,
    derivatives,
    every_check,
    narrow_dtypes,
    randn,
    random_like,
    refused,
)

from gradmem_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_dual, logits_budget

OP = "linear_cross_entropy"
IGNORE = -100
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def plain(hidden, weight, labels, bias=None, ignore_index=IGNORE):
    logits = hidden @ weight.mT if bias is None else hidden @ weight.mT + bias
    counted = labels != ignore_index
    picked = logits.log_softmax(-1).gather(-1, labels.where(counted, 0)[..., None])[..., 0]
    if logits.dtype != torch.float64:
        picked = picked.float()  # a mean over many tokens outgrows half precision
    return -(picked * counted).sum(-1) / counted.sum(-1).clamp(min=1)


def case(backend, labels, classes, d=2, bias=True, ignore_index=IGNORE, **options):
    labels = torch.as_tensor(labels, dtype=torch.int64)
    options |= {"ignore_index": ignore_index, "backend": backend}

    def dual(hidden, weight, *bias_and_tangent, labels):
        *bias, hidden_t = bias_and_tangent
        return linear_cross_entropy_dual(hidden, weight, labels, hidden_t, bias=bias[0] if bias else None, **options)

    inputs = randn(*labels.shape, d), randn(classes, d), randn(classes)
    return Case(
        OP, dual=dual, inputs=inputs[: 2 + bias], active=(0,), aux={"labels": labels},
        batched=(True, False, False)[: 2 + bias],
        plain=lambda hidden, weight, bias=None, *, labels: plain(hidden, weight, labels, bias, ignore_index),
        op=lambda hidden, weight, bias=None, *, labels: linear_cross_entropy(hidden, weight, labels, bias=bias,
                                                                             **options))


def random_labels(*shape, classes, ignored=0.3):
    return torch.randint(classes, shape).masked_fill(torch.rand(shape) < ignored, IGNORE)


@every_check(
    no_bias={"labels": [[0, 2, 1], [1, 1, 0]], "classes": 3, "bias": False},
    bias={"labels": [[3, 0]], "classes": 5},
    some_ignored={"labels": [[1, IGNORE, 0], [IGNORE] * 3, [IGNORE, IGNORE, 2]], "classes": 3, "d": 1},
    another_ignore_index={"labels": [[1, 0, 1, 2], [1, 1, 1, 1]], "classes": 3, "d": 1, "ignore_index": 1},
    one_row={"labels": [[2]], "classes": 4},
    one_class={"labels": [[0, 0], [IGNORE, 0]], "classes": 1})
def test_guarantees(check, options, backend):
    check(case(backend, **options))


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_of_rows(chunk, bias):
    """However many rows of logits the reference kernels hold at once, the results are the same."""
    chunked = case("reference", random_labels(2, 4, classes=6), 6, 3, bias)
    with logits_budget(chunk * 6 * 8):
        check_values(chunked)
        check_dual(chunked)


@narrow_dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_precision(dtype, bias, backend):
    check_precision(case(backend, random_labels(3, 17, classes=40), 40, 33, bias), dtype,
                    only_rounds=backend == "reference")


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_empty(shape, bias, backend):
    check_empty(case(backend, torch.empty(shape), 4, bias=bias))


@given(batch=st.integers(1, 3), length=st.integers(0, 6), classes=st.integers(1, 9), d=st.integers(1, 5),
       ignored=st.floats(0, 1), bias=st.booleans())
def test_any_shape(backend, batch, length, classes, d, ignored, bias):
    any_case = case(backend, random_labels(batch, length, classes=classes, ignored=ignored), classes, d, bias)
    check_values(any_case)
    check_dual(any_case)


def test_samples_without_labels_are_zero(backend):
    one = case(backend, [[IGNORE, IGNORE], [1, IGNORE]], 3)
    u = tuple(map(random_like, one.inputs))
    d = derivatives(one.run_op, one.inputs, one.cotangent(), u)
    for of_sample in (d.y, d.first[0], d.second[0], d.second[-1], *one.run_dual(*one.inputs, u[0])):
        assert torch.count_nonzero(of_sample[0]) == 0
        assert torch.count_nonzero(of_sample[1]) > 0


@pytest.mark.parametrize("bias", [False, True])
def test_all_labels_ignored(bias, backend):
    nothing = case(backend, torch.full((2, 3), IGNORE), 4, bias=bias)
    d = derivatives(nothing.run_op, nothing.inputs, nothing.cotangent(), tuple(map(random_like, nothing.inputs)))
    assert all(torch.count_nonzero(t) == 0 for t in (d.y, *d.first, *d.second))


def test_large_logits(backend):
    """No overflow: the logits reach +-1e4."""
    labels = torch.tensor([[0, 1]])
    hidden = torch.tensor([[[1e4, -1e4], [1e4, -1e4]]], requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.eye(2), labels, backend=backend)
    (g,) = torch.autograd.grad(loss.sum(), hidden)
    assert torch.equal(loss, torch.tensor([1e4]))
    assert torch.equal(g, torch.tensor([[[0.0, 0.0], [0.5, -0.5]]]))


@pytest.mark.parametrize(("dtype", "expected"), [
    (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32)])
def test_dtype_of_the_loss(dtype, expected, backend):
    one = case(backend, [[1, 0]], 3).to(dtype)
    assert one.run_op(*one.inputs).dtype == expected
    assert [t.dtype for t in one.run_dual(*one.inputs, one.inputs[0])] == [expected] * 2


H, W, L = torch.ones(2, 3, 4), torch.ones(5, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(("arguments", "argument", "expected", "got"), [
    ({"hidden": H[0]}, "hidden", "shape [B, S, D]", "[3, 4]"),
    ({"hidden": H.long()}, "hidden", "float64", "int64"),
    ({"weight": W.mT}, "weight", "D=4", "[4, 5]"),
    ({"weight": W[:0]}, "weight", "V >= 1", "[0, 4]"),
    ({"weight": W.double()}, "weight", "the dtype of hidden, float32", "float64"),
    ({"labels": L[:, :2]}, "labels", "S=3", "[2, 2]"),
    ({"labels": L.int()}, "labels", "dtype int64", "int32"),
    ({"labels": L + 5}, "labels", "0 .. 4", "5"),
    ({"labels": L - 1}, "labels", "ignore_index=-100", "-1"),
    ({"labels": L - 100, "ignore_index": 0}, "labels", "ignore_index=0", "-100"),
    ({"labels": L.to("meta")}, "labels", "the device of hidden, cpu", "meta"),
    ({"bias": W}, "bias", "[V=5]", "[5, 4]"),
    ({"bias": W[:, 0].half()}, "bias", "the dtype of hidden, float32", "float16"),
    ({"ignore_index": None}, "ignore_index", "an int", "None"),
    ({"ignore_index": True}, "ignore_index", "an int", "True")])
def test_bad_arguments(arguments, argument, expected, got):
    arguments = {"hidden": H, "weight": W, "labels": L, **arguments}
    refused(lambda: linear_cross_entropy(**arguments), "linear_cross_entropy", argument, expected, got)
    refused(lambda: linear_cross_entropy_dual(**arguments, hidden_t=None), "linear_cross_entropy_dual", argument,
            expected, got)


def test_bad_tangent():
    refused(lambda: linear_cross_entropy_dual(H, W, L, H[:1]), "linear_cross_entropy_dual", "hidden_t", "[2, 3, 4]",
            "[1, 3, 4]")
