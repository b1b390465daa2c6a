"""Rotary embedding on a torch operator, whose launch a backend provides. Derivation: docs/rotary.md."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gradmem_kernels.operators.define import define, like, rows_dense
from gradmem_kernels.operators.rows import mapped_first

__all__ = ["Rotary", "table_strides"]


class Rotary:
    """The operator ``gradmem::{backend}_rotary``.

    ``launch(x, cos, sin, y, transposed)`` writes ``y``; the transpose has the sine negated. Rows of all tensors are
    dense; it is not called for tensors without elements.
    """

    def __init__(self, backend: str, launch: Callable[..., None]) -> None:
        self._launch = launch
        self._rotary = define(
            f"{backend}_rotary", "(Tensor x, Tensor cos, Tensor sin, bool transposed) -> Tensor", self.run,
            lambda x, cos, sin, transposed: like(x), mapped=_mapped)

    def forward(self, x, cos, sin):
        return self._rotary(x, cos, sin, False)

    def transpose(self, y_bar, cos, sin):
        return self._rotary(y_bar, cos, sin, True)

    def run(self, x, cos, sin, transposed):
        y = like(x)
        if x.numel() > 0:
            self._launch(*map(rows_dense, (x, cos, sin)), y, transposed)
        return y


def table_strides(table: Tensor) -> tuple[int, int]:
    """Of sample and position; a table that samples share has a stride of 0."""
    return (table.stride(0) if table.dim() == 3 else 0, table.stride(-2))


def _mapped(op, size, in_dims, arguments):
    """A rule for vmap: the mapped dimension becomes a part of the batch. Tables stay shared if they may."""
    x, cos, sin, transposed = arguments.values()
    x = mapped_first(x, in_dims[0], size)
    tables = cos, sin
    if any(isinstance(d, int) for d in in_dims[1:3]) or cos.dim() == 3:
        tables = [mapped_first(t, d, size) for t, d in zip(tables, in_dims[1:3], strict=True)]
        # [size, S, r/2] or [size, B, S, r/2]
        tables = [t.unsqueeze(1) if t.dim() == 3 else t for t in tables]
        tables = [t.expand(size, x.shape[1], *t.shape[2:]).flatten(0, 1) for t in tables]
    return op(x.flatten(0, 1), *tables, transposed).unflatten(0, (size, x.shape[1])), 0
