from __future__ import annotations

import weakref

import pytest
import torch
from second_order import (
    CHECKS,
    Case,
    check_empty,
    check_last_derivative,
    check_precision,
    check_values,
    derivatives,
    every_check,
    narrow_dtypes,
    randn,
    random_like,
    refused,
)

from gradmem_kernels.inner_sgd import inner_sgd, inner_sgd_dual

OP = "inner_sgd"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def plain(memory, grad, lr, clip_value, clip_norm):
    if clip_value is not None:
        grad = grad.clamp(-clip_value, clip_value)
    if clip_norm is not None:
        square = (grad * grad).flatten(1).sum(1) if grad.dim() > 1 else grad * grad
        over = square > clip_norm**2
        factor = torch.where(over, clip_norm / (torch.sqrt(torch.where(over, square, 1)) + 1e-6), 1)
        grad = grad * factor.view(-1, *(1,) * (grad.dim() - 1))
    return memory - lr * grad


def case(backend, shape=(3, 2, 2), lr=0.3, clip_value=None, clip_norm=None):
    """``lr`` is a number, or the shape of a tensor. The gradients of the samples differ in size."""
    clips = {"clip_value": clip_value, "clip_norm": clip_norm}
    grad = randn(*shape) * torch.linspace(0.2, 3, shape[0]).view(-1, *(1,) * (len(shape) - 1))
    per_sample = isinstance(lr, tuple) and len(lr) == len(shape) and lr[0] == shape[0]

    def dual(memory, grad, *lr_and_tangents):
        *rate, memory_t, grad_t = lr_and_tangents
        return inner_sgd_dual(memory, grad, rate[0] if rate else lr, memory_t, grad_t, **clips, backend=backend)

    return Case(
        OP, inputs=(randn(*shape), grad, *((randn(*lr),) if isinstance(lr, tuple) else ())), active=(0, 1), dual=dual,
        batched=(True, True, *((per_sample,) if isinstance(lr, tuple) else ())),
        plain=lambda memory, grad, rate=lr: plain(memory, grad, rate, **clips),
        op=lambda memory, grad, rate=lr: inner_sgd(memory, grad, rate, **clips, backend=backend))


@every_check(
    value={"clip_value": 0.6},
    norm={"clip_norm": 1.0},
    both={"clip_value": 0.8, "clip_norm": 0.9},
    scalars={"shape": (4,), "lr": (4,), "clip_norm": 0.7},
    lr={"lr": ()},
    lr_per_sample={"lr": (3, 1, 1), "clip_norm": 1.0},
    lr_per_channel={"lr": (2,), "clip_value": 0.8, "clip_norm": 0.9},
    lr_per_row={"shape": (2, 3, 1), "lr": (3, 1), "clip_value": 0.5},
    lr_per_element={"shape": (2, 3), "lr": (2, 3)})
def test_guarantees(check, options, backend):
    check(case(backend, **options))


@every_check(
    # linear in memory and gradient: there is no third derivative to refuse
    checks=[check for check in CHECKS if check is not check_last_derivative],
    number={}, one_sample={"shape": (1, 3)}, zero={"lr": 0})
def test_guarantees_without_clipping(check, options, backend):
    check(case(backend, **options))


@narrow_dtypes
@pytest.mark.parametrize("lr", [0.3, (), (1, 33)], ids=str)
@pytest.mark.parametrize("clips", [{}, {"clip_value": 0.8, "clip_norm": 9.0}], ids=["", "clipped"])
def test_precision(dtype, lr, clips, backend):
    check_precision(case(backend, (3, 9, 33), lr, **clips), dtype)


@pytest.mark.parametrize("shape", [(0,), (0, 2, 3), (2, 0, 3), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("lr", [0.3, ()], ids=str)
@pytest.mark.parametrize("clips", [{}, {"clip_value": 0.8, "clip_norm": 0.9}], ids=["", "clipped"])
def test_empty(shape, lr, clips, backend):
    check_empty(case(backend, shape, lr, **clips))


def test_empty_with_a_rate_for_each_channel(backend):
    check_empty(case(backend, (2, 0, 3), (3,)))


@pytest.mark.parametrize("lr", [(0, 1, 1), (0, 2, 1), (0, 2, 3)], ids=str)
def test_empty_with_a_rate_for_each_sample(lr, backend):
    check_empty(case(backend, (0, 2, 3), lr))


@pytest.mark.parametrize("lr", [0.3, ()], ids=str)
def test_zero_gradient_is_not_divided_by_its_norm(lr, backend):
    still = case(backend, (2, 3), lr, clip_value=1.0, clip_norm=0.5)
    still.inputs[1][0] = 0
    check_values(still)
    assert torch.equal(still.run_op(*still.inputs)[0], still.inputs[0][0])


def test_norm_is_clipped_to_the_bound(backend):
    memory, grad = torch.zeros(2, 3, 4).double(), randn(2, 3, 4)
    grad[0] *= 1e-3
    step = -inner_sgd(memory, grad, 1.0, clip_norm=0.5, backend=backend)
    assert torch.equal(step[0], grad[0])
    torch.testing.assert_close(step[1].norm(), torch.tensor(0.5).double(), rtol=1e-5, atol=0)


def test_slope_of_the_clamp_is_one_on_its_bounds(backend):
    grad = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]], requires_grad=True)
    inner_sgd(torch.zeros(1, 5), grad, 1.0, clip_value=1.0, backend=backend).sum().backward()
    assert torch.equal(grad.grad, torch.tensor([[0.0, -1.0, -1.0, -1.0, 0.0]]))


@pytest.mark.parametrize(("memory_dtype", "lr_dtype"), [
    (torch.float64, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_lr_of_another_dtype(memory_dtype, lr_dtype, backend):
    memory, grad = randn(2, 3).to(memory_dtype).requires_grad_(), randn(2, 3).to(memory_dtype).requires_grad_()
    lr = randn(3).to(lr_dtype).requires_grad_()
    u = tuple(map(random_like, (memory, grad, lr)))
    d = derivatives(lambda *x: inner_sgd(*x, clip_norm=0.5, backend=backend), (memory, grad, lr),
                    torch.ones_like(memory), u)
    exact = derivatives(lambda *x: plain(*x, None, 0.5), tuple(t.double() for t in (memory, grad, lr)),
                        torch.ones(2, 3).double(), tuple(t.double() for t in u))
    assert d.y.dtype == memory_dtype
    assert [t.dtype for t in d.first] == [memory_dtype, memory_dtype, lr_dtype]
    assert [t.dtype for t in d.second[:3]] == [memory_dtype, memory_dtype, lr_dtype]
    rounding = 4 * max(torch.finfo(t).eps for t in (memory_dtype, lr_dtype))
    for name, value in d.named().items():
        torch.testing.assert_close(value.double(), exact.named()[name], rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("options", "kept"), [
    ({}, (False, False, False)), ({"clip_norm": 1.0}, (False, True, False)), ({"lr": ()}, (False, True, True))])
def test_keeps_only_what_it_needs(options, kept, backend):
    one = case(backend, **options)
    leaves = [t.requires_grad_() for t in one.inputs]
    x = [t * 1 for t in leaves]
    s = one.run_op(*x).sum()
    dead = [weakref.ref(t.untyped_storage()) for t in x]
    del x
    assert tuple(ref() is not None for ref in dead) == kept[: len(dead)]
    torch.autograd.grad(s, leaves)


M = torch.ones(2, 3, 4)


@pytest.mark.parametrize(("arguments", "argument", "expected", "got"), [
    ({"memory": 1.0}, "memory", "a tensor", "float"),
    ({"memory": torch.tensor(1.0)}, "memory", "[B, ...]", "[]"),
    ({"memory": M.long()}, "memory", "float64", "int64"),
    ({"grad": M[:1]}, "grad", "2", "[1, 3, 4]"),
    ({"grad": M.mT}, "grad", "the shape of memory, [2, 3, 4]", "[2, 4, 3]"),
    ({"grad": M.half()}, "grad", "the dtype of memory, float32", "float16"),
    ({"grad": M.to("meta")}, "grad", "the device of memory, cpu", "meta"),
    ({"lr": "0.1"}, "lr", "a number", "str"),
    ({"lr": -0.1}, "lr", ">= 0", "-0.1"),
    ({"lr": float("nan")}, "lr", "finite", "nan"),
    ({"lr": torch.tensor(float("nan"))}, "lr", "finite", "nan"),
    ({"lr": torch.ones(3)}, "lr", "broadcasts to memory's, [2, 3, 4]", "[3]"),
    ({"lr": torch.ones(1, 1, 1, 1)}, "lr", "broadcasts to memory's", "[1, 1, 1, 1]"),
    ({"lr": torch.tensor(1)}, "lr", "float64", "int64"),
    ({"lr": torch.ones((), device="meta")}, "lr", "the device of memory, cpu", "meta"),
    ({"clip_value": 0}, "clip_value", "> 0", "0"),
    ({"clip_value": torch.tensor(1.0)}, "clip_value", "a number", "Tensor"),
    ({"clip_norm": -1.0}, "clip_norm", "> 0", "-1.0"),
    ({"clip_norm": float("inf")}, "clip_norm", "finite", "inf")])
def test_bad_arguments(arguments, argument, expected, got):
    arguments = {"memory": M, "grad": M, "lr": 0.1, **arguments}
    refused(lambda: inner_sgd(**arguments), "inner_sgd", argument, expected, got)
    refused(lambda: inner_sgd_dual(**arguments, memory_t=None, grad_t=None), "inner_sgd_dual", argument, expected, got)


@pytest.mark.parametrize("argument", ["memory_t", "grad_t"])
def test_bad_tangents(argument):
    tangents = {"memory_t": None, "grad_t": None, argument: M[0]}
    refused(lambda: inner_sgd_dual(M, M, 0.1, **tangents), "inner_sgd_dual", argument, "[2, 3, 4]", "[3, 4]")
