"""What ops on rows share: tensors ``[..., D]`` whose rows, or elements, do not know of each other.

An operator allocates results of one shape together, so that a primal and its tangent are halves of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradmem_kernels.operators.define import one_by_one, rows_dense

__all__ = ["as_rows", "flat_or_rows", "mapped_first", "mapped_over_rows", "parts", "stacked"]


def stacked(like: Tensor, count: int) -> Tensor:
    """An unwritten tensor for ``count`` results of the shape of ``like``: ``[count, *shape]``; ``[*shape]`` for one."""
    return like.new_empty(like.shape if count == 1 else (count, *like.shape))


def parts(t: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The results in a tensor of :func:`stacked`, in order; ``None`` for what was not wanted."""
    count = sum(wanted)
    found = iter((t,) if count == 1 else t.unbind(0) if count else ())
    return tuple(next(found) if flag else None for flag in wanted)


def as_rows(*tensors: Tensor | None) -> tuple[int, list[Tensor | None], list[tuple[int, int]]]:
    """``inner, tensors, strides``: row ``i`` begins at ``i // inner * stride[0] + i % inner * stride[1]``.

    The tensors have one shape ``[..., D]``; ``None`` stays. They are copied where their rows are not dense, or lie so
    that two strides cannot tell where.
    """
    if all(t is None or t.is_contiguous() for t in tensors):
        shape = next(t for t in tensors if t is not None).shape
        return max(1, shape[:-1].numel()), list(tensors), [(0, 0 if t is None else shape[-1]) for t in tensors]
    given = [t for t in map(rows_dense, tensors) if t is not None]
    shape = given[0].shape[:-1]
    for cut in range(max(1, len(shape))):
        found = [(_stride(t, 0, cut), _stride(t, cut, len(shape))) for t in given]
        if all(None not in strides for strides in found):
            break
    else:
        cut, given = 0, [t.contiguous() for t in given]
        found = [(0, t.shape[-1]) for t in given]
    rest = iter(zip(given, found, strict=True))
    pairs = [(None, (0, 0)) if t is None else next(rest) for t in tensors]
    return max(1, shape[cut:].numel()), [t for t, _ in pairs], [strides for _, strides in pairs]


def flat_or_rows(*tensors: Tensor | None) -> tuple[int, int, list[Tensor | None], list[int]]:
    """``rows, D, tensors, strides`` for elementwise work on tensors of one shape; ``None`` stays.

    One long row where all are contiguous, so that short last dimensions cost nothing; else rows of the last dimension
    at one stride, tensors copied where that does not do.
    """
    given = next(t for t in tensors if t is not None)
    if all(t is None or t.is_contiguous() for t in tensors):
        return 1, given.numel(), list(tensors), [0] * len(tensors)
    last = given.dim() - 1
    laid = [t if t is None or (rows_dense(t) is t and _stride(t, 0, last) is not None) else t.contiguous()
            for t in tensors]
    return (given.shape[:-1].numel(), given.shape[-1], laid,
            [0 if t is None else _stride(t, 0, last) or 0 for t in laid])


def _stride(t: Tensor, start: int, stop: int) -> int | None:
    """The distance of neighbours if the dimensions ``start .. stop - 1`` are taken as one; ``None`` if they differ."""
    stride, size = 0, 1
    for d in reversed(range(start, stop)):
        if t.shape[d] == 1:
            continue
        if size == 1:
            stride = t.stride(d)
        elif t.stride(d) != stride * size:
            return None
        size *= t.shape[d]
    return stride


def mapped_over_rows(op: Callable[..., Any], size: int, in_dims: Sequence[Any], arguments: Mapping[str, Any], *,
                     weights: Collection[str] = (), sums: str | None = None) -> tuple[Any, Any]:
    """A rule for vmap: the mapped dimension comes first in every tensor, the weights aside.

    Mapped weights, and sums over rows (flags in the argument ``sums``), which each entry has for itself, go one by one.
    """
    if any(isinstance(d, int) for name, d in zip(arguments, in_dims, strict=True) if name in weights) or (
            sums is not None and any(arguments[sums])):
        return one_by_one(op, size, in_dims, tuple(arguments.values()))
    args = [mapped_first(value, d, size) if isinstance(value, Tensor) and name not in weights else value
            for (name, value), d in zip(arguments.items(), in_dims, strict=True)]
    out, rank = op(*args), args[0].dim()

    def place(t: Tensor) -> int | None:
        return t.dim() - rank if t.dim() >= rank else None  # behind the dimension of stacked results

    return out, place(out) if isinstance(out, Tensor) else tuple(map(place, out))


def mapped_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    """``t`` with the mapped dimension first; repeated if it is not mapped over."""
    return t.movedim(dim, 0) if isinstance(dim, int) else t.expand(size, *t.shape)
