"""Kernels as torch operators: layouts that they can take, and their registration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["define", "like", "one_by_one", "one_layout", "rows_dense", "strides"]

_LIBRARY = torch.library.Library("gradmem", "FRAGMENT")


def rows_dense(t: Tensor | None) -> Tensor | None:
    """``t``, copied if the elements of a row are not neighbours in memory."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def one_layout(t: Tensor, tangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both, rows dense, with the same strides; copied where they are not."""
    if tangent is None:
        return rows_dense(t), None
    if t.stride() == tangent.stride() and rows_dense(t) is t:
        return t, tangent
    return t.contiguous(), tangent.contiguous()


def like(t: Tensor, count: int = 1) -> Tensor:
    """An unwritten tensor of the layout of ``t``, rows dense; for ``count`` of them ``[count, *shape]``."""
    out = torch.empty_like(t)
    if rows_dense(out) is not out:
        out = torch.empty_like(t, memory_format=torch.contiguous_format)
    return out if count == 1 else t.new_empty_strided((count, *t.shape), (t.numel(), *out.stride()))


def strides(t: Tensor | None) -> tuple[int, int, int]:
    """Of batch, head and row."""
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(1), t.stride(2))


def define(name: str, schema: str, launch: Callable[..., Any], meta: Callable[..., Any],
           shared: Collection[str] = (), broadcast: Collection[str] = (), ranks: Sequence[int] = (),
           mapped: Callable[..., tuple[Any, Any]] | None = None) -> Callable[..., Any]:
    """Registers ``gradmem::name`` and returns it.

    ``meta`` gives its outputs unwritten. Under vmap the mapped dimension is folded into the batch, the first dimension
    of every tensor but those named in ``shared``; those in ``broadcast`` may have a batch of 1. ``ranks`` are those of
    the outputs: a dimension more is that of stacked results, fewer are of one that is absent. An op for which this does
    not do brings a rule of its own, ``mapped(op, size, in_dims, arguments by name) -> outputs, out_dims``.
    """
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, launch, "CPU")
    _LIBRARY.impl(name, launch, "CUDA")
    torch.library.register_fake(f"gradmem::{name}", meta, lib=_LIBRARY)
    op = getattr(torch.ops.gradmem, name).default
    names = [argument.name for argument in op._schema.arguments]

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if mapped is not None:
            return mapped(op, info.batch_size, in_dims, dict(zip(names, args, strict=True)))
        # dropout follows the place in the batch, which is the same for every mapped call
        if dict(zip(names, args, strict=True)).get("dropout") or any(
                isinstance(d, int) for n, d in zip(names, in_dims, strict=True) if n in shared):
            return one_by_one(op, info.batch_size, in_dims, args)
        batch = next(t.movedim(d, 0).shape[1] for t, d in zip(args, in_dims, strict=True) if isinstance(d, int))
        folded = [_fold(t, d, info.batch_size, batch, n in broadcast)
                  if isinstance(t, Tensor) and n not in shared else t
                  for n, t, d in zip(names, args, in_dims, strict=True)]
        out = op(*folded)
        places = [t.dim() - rank if t.dim() >= rank else None for t, rank in zip(out, ranks, strict=True)]
        return (tuple(t if d is None else t.unflatten(d, (info.batch_size, batch))
                      for t, d in zip(out, places, strict=True)), tuple(places))

    torch.library.register_vmap(f"gradmem::{name}", vmap, lib=_LIBRARY)
    return op


def _fold(t: Tensor, dim: int | None, size: int, batch: int, broadcast: bool) -> Tensor:
    if dim is None:
        if broadcast and t.shape[0] == 1:
            return t
        t = t.unsqueeze(0).expand(size, *t.shape)
    else:
        t = t.movedim(dim, 0)
    if t.shape[1] != batch:
        t = t.expand(size, batch, *t.shape[2:])
    return t.flatten(0, 1)


def one_by_one(op: Callable[..., tuple[Tensor, ...]], size: int, in_dims: Sequence[int | None],
               args: Sequence[Any]) -> tuple[Any, Any]:
    """A rule for vmap: a call for each of the ``size`` mapped entries."""
    outs = [op(*(t.select(d, i) if isinstance(d, int) else t for t, d in zip(args, in_dims, strict=True)))
            for i in range(size)]
    return tuple(map(torch.stack, zip(*outs, strict=True))), (0,) * len(outs[0])
