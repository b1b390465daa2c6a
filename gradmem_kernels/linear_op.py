"""Ops that are linear in their input: derivatives of every order (docs/autograd.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmem_kernels.derivatives import Function, in_own_dtype
from gradmem_kernels.ranges import named_range

__all__ = ["LinearOp"]


class LinearOp:
    """An op that is linear in its input, given by itself and its transpose: derivatives of every order exist.

    ``forward`` and ``transpose`` take ``(x, *aux)`` and return a tensor like ``x``.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @torch.compiler.disable
    def __call__(self, forward: Callable[..., Tensor], transpose: Callable[..., Tensor], x: Tensor,
                 *aux: Tensor) -> Tensor:
        with named_range(self.name):
            return _Linear.apply(_Map(self.name, "forward", forward), _Map(self.name, "transpose", transpose), x, *aux)


@dataclass(frozen=True, eq=False)
class _Map:
    """A linear map of an op, by its name."""

    op: str
    kernel: str
    function: Callable[..., Tensor]

    def __call__(self, x: Tensor, *aux: Tensor) -> Tensor:
        with named_range(self.op, self.kernel):
            return self.function(x, *aux)


class _Linear(Function):
    generate_vmap_rule = True

    @staticmethod
    @in_own_dtype
    def forward(forward: _Map, transpose: _Map, x: Tensor, *aux: Tensor) -> Tensor:
        return forward(x, *aux)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.forward, ctx.transpose, _, *aux = inputs
        ctx.save_for_backward(*aux)
        ctx.save_for_forward(*aux)

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        aux = ctx.saved_tensors
        return None, None, _Linear.apply(ctx.transpose, ctx.forward, y_bar, *aux), *(None,) * len(aux)

    @staticmethod
    def jvp(ctx: Any, _forward: None, _transpose: None, x_t: Tensor, *_: None) -> Tensor:
        return _Linear.apply(ctx.forward, ctx.transpose, x_t, *ctx.saved_tensors)
