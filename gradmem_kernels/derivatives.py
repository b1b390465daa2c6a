"""What autograd functions here share: which gradients a backward pass asks for, and where derivatives end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

__all__ = ["Flags", "Function", "HigherOrderError", "Tensors", "in_own_dtype", "last_derivative", "needed",
           "note_inputs", "refuse", "will_run"]

Tensors = tuple[Tensor | None, ...]
Flags = tuple[bool, ...]
T = TypeVar("T")


class HigherOrderError(RuntimeError):
    """A derivative beyond the second (or beyond the first, for a ``*_dual`` op) was asked for."""


def in_own_dtype(run: Callable[..., T]) -> Callable[..., T]:
    """Runs kernels in the dtype of their tensors, whatever autocast says when they happen to run."""

    @functools.wraps(run)
    def run_without_autocast(*args: Any) -> T:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return run(*args)
        with torch.autocast(device, enabled=False):
            return run(*args)

    return run_without_autocast


def needed(ctx: Any) -> Flags:
    """``ctx.needs_input_grad``, less what the running backward pass will not use.

    ``autograd.grad(loss, memory)`` asks for no weight gradients although the weights require grad; torch's own nodes
    know this, those of a Function have to ask.
    """
    edges = iter(ctx.next_functions)  # one for each tensor among the inputs
    nodes = [next(edges)[0] if is_tensor else None for is_tensor in ctx.is_tensor]
    return tuple(need and will_run(node) for need, node in zip(ctx.needs_input_grad, nodes, strict=True))


def note_inputs(ctx: Any, inputs: Sequence[Any]) -> None:
    """What :func:`needed` has to know of the inputs of a Function; cotangents that are zeros will be ``None``."""
    ctx.set_materialize_grads(False)
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]


def will_run(node: Any) -> bool:
    """Whether the running backward pass will come to this node."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # refused for a leaf that the pass was asked for by name
        return True


class Function(torch.autograd.Function):
    """A function that is called without inspecting the signature of its forward, which takes PyTorch longer than a
    small kernel, to bind defaults that there are none of. Under transforms of ``torch.func`` it is PyTorch's matter.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


class _Last(Function):
    """``apply(name, compute, *tensors) -> compute(*tensors)``, of which no derivative exists."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, compute: Callable[..., Tensors], *tensors: Tensor | None) -> Tensors:
        return compute(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> NoReturn:
        refuse(ctx.name)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> NoReturn:
        refuse(ctx.name)


def last_derivative(name: str, compute: Callable[..., Tensors], *tensors: Tensor | None) -> Tensors:
    """``compute(*tensors)``, run without a graph; differentiating the result by ``tensors`` raises, naming ``name``."""
    return _Last.apply(name, compute, *tensors)


def refuse(name: str) -> NoReturn:
    """Raises, for a derivative that ``name`` does not have."""
    raise HigherOrderError(
        f"{name}: this derivative is of a higher order than its kernels have. Ops are differentiable twice, *_dual "
        f"ops once; for more, use plain PyTorch operations, or detach what needs no further derivative.")
