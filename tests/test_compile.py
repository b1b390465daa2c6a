"""Attention under torch.compile: it breaks the graph and stays right; a second derivative is right, or raises."""

import pytest
import torch
from second_order import assert_close, randn

from gradmem_kernels import attention, attention_dual

X = ("q", "k", "v")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["eager", "aot_eager"])
def compiled(request):
    """Dynamo alone, and with ahead-of-time autograd; code generation adds nothing of interest here."""
    return lambda f: torch.compile(f, backend=request.param)


@pytest.fixture
def x():
    return tuple(randn(2, 2, 5, 3).requires_grad_() for _ in X)


def loss(q, k, v):
    return (attention(q * 2, k, v.sin(), causal=True) * 3).square().sum()


def penalty(q, k, v):
    """A first derivative inside, so that differentiating this is second order."""
    grads = torch.autograd.grad(loss(q, k, v), (q, k, v), create_graph=True)
    return sum(g.square().sum() for g in grads)


def named(grads):
    return dict(zip(X, grads, strict=True))


def test_first_order(compiled, x):
    value = compiled(loss)(*x)
    assert_close({"loss": value, **named(torch.autograd.grad(value, x))},
                 {"loss": loss(*x), **named(torch.autograd.grad(loss(*x), x))})


def test_dual(compiled, x):
    def f(q, k, v):
        o, o_t = attention_dual(q * 2, k, v, k, None, q)
        return (o * o_t).sum()

    assert_close(named(torch.autograd.grad(compiled(f)(*x), x)), named(torch.autograd.grad(f(*x), x)))


def test_a_second_derivative_of_a_compiled_function(compiled, x):
    """The code around the op is compiled, and PyTorch may have no double backward of that; it then raises."""
    expected = torch.autograd.grad(penalty(*x), x)
    try:
        first = torch.autograd.grad(compiled(loss)(*x), x, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), x)
    except RuntimeError:
        return
    assert_close(named(second), named(expected))


def test_a_second_derivative_inside_a_compiled_function(compiled, x):
    expected = torch.autograd.grad(penalty(*x), x)
    try:
        second = torch.autograd.grad(compiled(penalty)(*x), x)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException):
        return
    assert_close(named(second), named(expected))


def test_the_graph_cannot_be_whole(x):
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="eager", fullgraph=True)(*x)
