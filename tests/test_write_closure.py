"""Which tensors WRITE's loss closes over: found, given, or refused by name; no gradient is missed or taken twice."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from test_write import F64, Quartic, agree, outer_loss
from torch import Tensor

from benchmarks.live_memory import LiveMemory
from gradmem_kernels import write
from gradmem_kernels.checks import ArgumentError


@pytest.mark.parametrize("steps", [1, 2])
def test_closed_over_non_leaf_is_refused_by_name(steps: int) -> None:
    loss = Quartic()
    embedded = loss.w * 2.0

    def closes_over(m: Tensor) -> Tensor:
        return (m @ embedded).tanh().sum((1, 2))

    with pytest.raises(ArgumentError, match=r"params.*'embedded', of shape \[4, 3\].*pass it in params="):
        write(closes_over, loss.memory[0], steps=steps, lr=0.1)


@pytest.mark.parametrize("steps", [1, 3])
def test_closed_over_non_leaf_can_be_given(steps: int) -> None:
    loss = Quartic()
    embedded = loss.w * 2.0

    def closes_over(m: Tensor) -> Tensor:
        return (m @ embedded + loss.b).tanh().square().sum((1, 2))

    out = write(closes_over, loss.memory[0], steps=steps, lr=0.1, params=[embedded, loss.b])
    memory, losses, _ = plain.write(closes_over, loss.memory, steps=steps, lr=lambda k, i: 0.1)
    agree(torch.autograd.grad(outer_loss((out.memory,), out.losses), loss.leaves, retain_graph=True),
          torch.autograd.grad(outer_loss(memory, losses), loss.leaves))


def test_closed_over_leaf_missing_from_params_is_refused_by_name() -> None:
    loss = Quartic()
    with pytest.raises(ArgumentError, match=r"params.*'b', of shape \[3\].*add it"):
        write(loss, loss.memory[0], steps=2, lr=0.1, params=[loss.w])


def test_leaf_reached_directly_and_through_a_given_tensor_is_refused() -> None:
    loss = Quartic()
    embedded = loss.w * 2.0

    def closes_over(m: Tensor) -> Tensor:
        return (m @ embedded).tanh().sum((1, 2)) + (m @ loss.w).sum((1, 2)).square()

    with pytest.raises(ArgumentError, match="directly and through another"):
        write(closes_over, loss.memory[0], steps=2, lr=0.1, params=[embedded, loss.w])


class Doubled(torch.autograd.Function):
    """Keeps its input under a name that autograd's node of a leaf has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = x
        return 2 * x

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> Tensor:
        return 2 * y_bar


def test_leaves_behind_functions_of_ones_own_are_found() -> None:
    loss = Quartic()

    def through(m: Tensor) -> Tensor:
        return (m @ Doubled.apply(loss.w.tanh())).square().sum((1, 2))

    found = [torch.autograd.grad(write(through, loss.memory[0], steps=2, lr=0.1, recompute=mode).memory.sin().sum(),
                                 (*loss.memory, loss.w)) for mode in ("step", "none")]
    agree(*found)


def test_module_parameters_and_bound_methods_are_found() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    memory = torch.randn(2, 3, 4, dtype=F64)

    def loss(m: Tensor) -> Tensor:
        return module(m).square().sum((1, 2))

    out = write(loss, memory, steps=2, lr=0.1)
    written, _, _ = plain.write(loss, (memory.clone(),), steps=2, lr=lambda k, i: 0.1)
    agree(torch.autograd.grad(out.memory.square().sum(), tuple(module.parameters())),
          torch.autograd.grad(written[0].square().sum(), tuple(module.parameters())))


def test_a_tensor_behind_another_of_params_is_refused() -> None:
    """Its gradient would arrive through the other one too, and twice."""
    loss = Quartic()
    embedded = loss.w * 2.0
    part = embedded[:, :2]

    def closes_over(m: Tensor) -> Tensor:
        return (m @ embedded).square().sum((1, 2)) + (m @ part).pow(3).sum((1, 2))

    with pytest.raises(ArgumentError, match=r"params.*'embedded', of shape \[4, 3\].*directly and through another"):
        write(closes_over, loss.memory[0], steps=2, lr=0.1, params=[embedded, part])


def test_tensors_of_params_may_have_one_origin() -> None:
    loss = Quartic()
    first, rest = (loss.w * 2.0).tensor_split([1], dim=1)
    bias = loss.b.exp()

    def closes_over(m: Tensor) -> Tensor:
        return (m @ first).square().sum((1, 2)) + (m @ rest + bias[1:]).pow(3).sum((1, 2))

    out = write(closes_over, loss.memory[0], steps=2, lr=0.1, params=[first, rest, bias])
    memory, losses, _ = plain.write(closes_over, loss.memory, steps=2, lr=lambda k, i: 0.1)
    agree(torch.autograd.grad(outer_loss((out.memory,), out.losses), loss.leaves, retain_graph=True),
          torch.autograd.grad(outer_loss(memory, losses), loss.leaves))


@pytest.mark.parametrize("recompute", ["none", "step"])
def test_what_a_given_tensor_retains_is_its_whole_gradient(recompute: str) -> None:
    loss = Quartic()
    embedded = loss.w * 2.0
    embedded.retain_grad()
    seen: list[Tensor] = []
    embedded.register_hook(seen.append)
    out = write(lambda m: (m @ embedded).tanh().square().sum((1, 2)), loss.memory[0], steps=3, lr=0.1,
                params=[embedded], recompute=recompute)
    out.memory.square().sum().backward()
    assert len(seen) == 1
    agree((2 * embedded.grad, 2 * seen[0]), (loss.w.grad,) * 2)


@pytest.mark.parametrize("recompute", ["none", "step"])
def test_params_may_come_from_an_iterator(recompute: str) -> None:
    module, memory = torch.nn.Linear(4, 2).double(), torch.randn(2, 3, 4, dtype=F64)
    found = []
    for params in (None, module.parameters()):
        out = write(lambda m: module(m).tanh().sum((1, 2)), memory, steps=2, lr=0.1, params=params, recompute=recompute)
        found.append(torch.autograd.grad(out.memory.square().sum(), tuple(module.parameters())))
    assert all(map(torch.equal, *found))


def test_nothing_of_a_step_outlives_it() -> None:
    """Not what it computes of weights alone either, which the inner gradient never passes."""
    w, rows = torch.randn(4, 4, requires_grad=True), torch.ones(5000, 4)

    def loss(m: Tensor) -> Tensor:
        return (m @ (rows @ w).tanh().exp().mean(0)).square().sum(1)

    for steps in (1, 2, 3):
        with LiveMemory() as memory:
            out = write(loss, torch.randn(2, 3, 4), steps=steps, lr=0.1)
            kept = memory.live
        assert kept < rows.nbytes / 10, steps
        assert out.memory.requires_grad


class Dual:
    """A loss with a dual form, less what a test takes away."""

    params: Any = ()

    def __call__(self, m: Tensor) -> Tensor:
        return m.pow(3).sum(1)

    def dual(self, m: Tensor, m_t: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return m.pow(3).sum(1), (3 * m.square() * m_t).sum(1)


def test_a_dual_form_may_take_what_it_is_told_by_any_name() -> None:
    m = torch.randn(2, 3, dtype=F64, requires_grad=True)
    out = write(Dual(), m, steps=2, lr=0.1)
    memory, _, _ = plain.write(Dual(), (m,), steps=2, lr=lambda k, i: 0.1)
    agree(torch.autograd.grad(out.memory.sin().sum(), m), torch.autograd.grad(memory[0].sin().sum(), m))


def test_a_dual_form_says_what_it_closes_over() -> None:
    class Silent(Dual):
        @property
        def params(self) -> Any:
            raise AttributeError

    class NoLeaf(Dual):
        params = (torch.ones(3, requires_grad=True) * 2,)

    for loss, message in ((Silent(), "expected params, the tensors that meta-gradients reach, beside a dual form, got"),
                          (NoLeaf(), r"expected detached\(\), as one of its params is no leaf, got none")):
        with pytest.raises(ArgumentError, match=f"write: loss_fn: {message}"):
            write(loss, torch.ones(2, 3), steps=1, lr=0.1)
