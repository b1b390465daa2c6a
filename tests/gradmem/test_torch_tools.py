"""What torch's own tools make of GradMem: each cell of docs/torch_tools.md that no other test shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointError, checkpoint

from gradmem import GradMem
from gradmem_kernels import ArgumentError, attention, write

CONTEXT, QUERY = torch.tensor([[1, 5, 3, 7, 2], [4, 4, 9, 0, 6]]), torch.tensor([[1, 5, 3], [9, 0, 6]])
M = torch.arange(24.0, dtype=torch.float64).view(2, 3, 4) / 24


def gradients(model: GradMem, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.fixture
def model(make_model: Any) -> GradMem:
    made: GradMem = make_model()
    return made


def test_a_compiled_model_around_it(model: GradMem) -> None:
    """The outer loss and its gradients are those of the model that is not compiled."""
    compiled = torch.compile(lambda context, query: model(context, query, query).loss * 2, backend="aot_eager")
    expected = 2 * model(CONTEXT, QUERY, QUERY).loss
    found = compiled(CONTEXT, QUERY)
    assert_close(found, expected)
    assert_close(gradients(model, found), gradients(model, expected))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="aot_eager", fullgraph=True)(CONTEXT, QUERY, QUERY)


@torch.no_grad()
def test_read_is_exported_compiled_mapped(model: GradMem) -> None:
    memory = model.write(CONTEXT).tensor

    def module(memory: Tensor, query: Tensor) -> Tensor:
        return model._logits(memory, query[..., :-1])  # what read runs, checks aside

    expected = module(memory, QUERY)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, memory: Tensor, query: Tensor) -> Tensor:
            return module(memory, query)

    assert_close(torch.export.export(Logits(), (memory, QUERY)).module()(memory, QUERY), expected)
    assert_close(torch.compile(module, backend="aot_eager")(memory, QUERY), expected)
    assert_close(torch.func.vmap(lambda m, q: module(m[None], q[None])[0])(memory, QUERY), expected)
    step = 1e-6
    _, tangent = torch.func.jvp(lambda m: module(m, QUERY), (memory,), (memory,))
    slope = (module(memory * (1 + step), QUERY) - module(memory * (1 - step), QUERY)) / (2 * step)
    assert_close(tangent, slope, rtol=1e-6, atol=1e-8)


def _loss(memory: Tensor) -> Tensor:
    return memory.square().sum((1, 2))


def _written(memory: Tensor) -> Tensor:
    return write(_loss, memory, lr=0.1, steps=2).memory


class Written(nn.Module):
    def forward(self, memory: Tensor) -> Tensor:
        return _written(memory)


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True)


def test_write_within_a_compiled_function() -> None:
    """Values and meta-gradients are those of the function that is not compiled."""
    memory = M.clone().requires_grad_()
    compiled = torch.compile(lambda m: 2 * _written(m), backend="aot_eager")(memory)
    assert_close(compiled, 2 * _written(memory))
    found, expected = (torch.autograd.grad(out.square().sum(), memory) for out in (compiled, 2 * _written(memory)))
    assert_close(found, expected)


def test_export(model: GradMem) -> None:
    """Ops and WRITE of a loss in plain PyTorch are exported; the model is refused by PyTorch, as it counts labels."""
    x = torch.randn(3, 1, 2, 5, 4).unbind(0)
    assert_close(torch.export.export(Attention(), x).module()(*x), attention(*x, causal=True))
    for seed in range(2):  # what was exported computes, and is not what it was exported with
        memory = M + seed
        assert_close(torch.export.export(Written(), (M,)).module()(memory), _written(memory))
    with pytest.raises(torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode):
        torch.export.export(model, (CONTEXT, QUERY))


def test_read_is_differentiated_by_transforms(model: GradMem) -> None:
    memory = model.write(CONTEXT).tensor.detach().requires_grad_()
    found = torch.func.grad(lambda m: model._logits(m, QUERY).square().sum())(memory.detach())
    assert_close((found,), torch.autograd.grad(model._logits(memory, QUERY).square().sum(), memory))


def test_read_within_a_compiled_function(model: GradMem) -> None:
    memory = model.write(CONTEXT)
    compiled = torch.compile(lambda m, q: 2 * model.read(m, q), backend="aot_eager")
    assert_close(compiled(memory, QUERY), 2 * model.read(memory, QUERY))


def _forward_mode() -> None:
    with torch.autograd.forward_ad.dual_level():
        _written(torch.autograd.forward_ad.make_dual(M, M))


@pytest.mark.parametrize("transform", [
    lambda: torch.func.grad(lambda m: _written(m).sum())(M), lambda: torch.func.vmap(_written)(M[None]),
    lambda: torch.func.jvp(_written, (M,), (M,)), _forward_mode], ids=["grad", "vmap", "jvp", "forward mode"])
def test_write_refuses_transforms(transform: Callable[[], object]) -> None:
    with pytest.raises(ArgumentError, match=r"outside torch\.func transforms and forward mode, got a call inside one"):
        transform()


def test_the_model_refuses_transforms(model: GradMem) -> None:
    with pytest.raises(ArgumentError, match=r"outside torch\.func transforms and forward mode"):
        torch.func.grad(lambda weights: torch.func.functional_call(model, weights, (CONTEXT, QUERY, QUERY)).loss)(
            dict(model.named_parameters()))


def test_a_checkpoint_around_write_raises_and_one_of_its_own_serves(make_model: Any) -> None:
    model: GradMem = make_model()
    with pytest.raises(CheckpointError):
        gradients(model, checkpoint(lambda c, q: model(c, q, q).loss, CONTEXT, QUERY, use_reentrant=False))
    own: GradMem = make_model(recompute="layer")
    assert_close(gradients(own, own(CONTEXT, QUERY, QUERY).loss), gradients(model, model(CONTEXT, QUERY, QUERY).loss))


def test_a_checkpoint_around_read(model: GradMem) -> None:
    memory = model.write(CONTEXT).tensor.detach().requires_grad_()
    found = checkpoint(lambda m: model._logits(m, QUERY), memory, use_reentrant=False)
    assert_close(torch.autograd.grad(found.square().sum(), memory),
                 torch.autograd.grad(model._logits(memory, QUERY).square().sum(), memory))


def test_automatic_mixed_precision(make_model: Any) -> None:
    model = make_model().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(CONTEXT, QUERY, QUERY).loss
    expected = model(CONTEXT, QUERY, QUERY).loss
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=2e-2, atol=0)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model, loss))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler.scale(expected).backward(retain_graph=True)
    scaler.unscale_(optimizer)
    assert_close(tuple(weight.grad for weight in model.parameters()), gradients(model, expected), rtol=1e-4, atol=1e-6)


def test_autocast_of_ops_write_and_read(make_model: Any) -> None:
    """Ops keep their tensors' dtype, WRITE its memory's; what is lost is what bfloat16 loses."""
    x = torch.randn(3, 1, 2, 5, 4).unbind(0)
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model, memory = make_model().float(), M.float()

    def written() -> Tensor:
        return write(lambda m: (m @ weight).float().square().sum((1, 2)), memory, lr=0.01, steps=2).memory

    document = model.write(CONTEXT)
    exact = attention(*x), written(), model.read(document, QUERY)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(*x), written(), model.read(document, QUERY)
    assert [t.dtype for t in found] == [torch.float32, torch.float32, torch.bfloat16]
    assert_close(found[0], exact[0])
    for ours, expected in zip(found[1:], exact[1:], strict=True):
        assert (ours.float() - expected).norm() < 2e-2 * expected.norm()
        assert not torch.equal(ours.float(), expected)
    gradient, exact_gradient = (torch.autograd.grad(out[1].square().sum(), weight)[0] for out in (found, exact))
    assert (gradient - exact_gradient).norm() < 2e-2 * exact_gradient.norm()
