"""Primal and tangent as the two halves of one tensor, copied only where they do not lie together already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gradmem_kernels.reference.common import is_wrapped

__all__ = ["join", "split"]


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of ``x [2, ...]``, views. Cotangents that lie together come back as one tensor without a copy."""
    return _Split.apply(x)


def join(primal: Tensor, tangent: Tensor) -> Tensor:
    """``[2, ...]``, a view of both where they are neighbours in memory, as a dual op allocates its results."""
    return _Join.apply(primal, tangent)


class _Split(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return x.unbind()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, primal_bar: Tensor, tangent_bar: Tensor) -> Tensor:
        return _Join.apply(primal_bar, tangent_bar)


class _Join(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(primal: Tensor, tangent: Tensor) -> Tensor:
        distance = tangent.storage_offset() - primal.storage_offset()
        together = (not is_wrapped(primal) and not is_wrapped(tangent) and primal.stride() == tangent.stride()
                    and primal.untyped_storage()._cdata == tangent.untyped_storage()._cdata
                    and distance == primal.numel() and torch._debug_has_internal_overlap(primal) == 0)
        if not together:
            return torch.stack((primal, tangent))
        return primal.as_strided((2, *primal.shape), (distance, *primal.stride()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, Tensor]:
        return _Split.apply(bar)
