"""Rows of linear_cross_entropy on two torch operators, whose launches a backend provides; the sweeps over chunks of
logits and their products are those of gradmem_kernels/reference/linear_cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gradmem_kernels.operators.define import define
from gradmem_kernels.reference import linear_cross_entropy as sweeps
from gradmem_kernels.reference.common import is_wrapped

__all__ = ["LinearCrossEntropy", "Rows"]

_ROWS = "Tensor(a!) z, Tensor(b!)? z_t, Tensor label"


class Rows(sweeps.RowKernels):
    """Rows of logits on the operators ``gradmem::{backend}_cross_entropy_forward`` and ``_backward``.

    ``launch_forward(z, z_t, label, a, b, wanted, row, row_t, lse, mu)`` writes the statistics that are not ``None``
    and, if wanted, the cotangents, as ``launch_backward(z, z_t, label, a, b, lse, mu)`` does: with a ``b`` dz_t in the
    place of z and dz in that of z_t; without one, dz for an ``a`` of 1 in that of z. Neither is called without rows.
    """

    def __init__(self, backend: str, launch_forward: Callable[..., None], launch_backward: Callable[..., None]) -> None:
        self._launch_forward, self._launch_backward = launch_forward, launch_backward
        tensors = "(Tensor(a!) z, Tensor(b!)? z_t, Tensor label, Tensor? a, Tensor? b"
        self._forward = define(
            f"{backend}_cross_entropy_forward", f"{tensors}, bool wanted) -> (Tensor, Tensor, Tensor, Tensor)",
            self._run_forward, _new_forward)
        self._backward = define(
            f"{backend}_cross_entropy_backward", f"{tensors}, Tensor lse, Tensor? mu) -> ()", self._run_backward,
            lambda *_: None)

    def forward(self, z, z_t, label, a, b, wanted):
        if _mapped(z, z_t, label, a, b):
            return super().forward(z, z_t, label, a, b, wanted)
        row, row_t, lse, mu = self._forward(z, z_t, label, a, b, wanted)
        stats = (row, None, lse, None) if z_t is None else (row, row_t, lse, mu)
        return stats, _bars(z, z_t, b) if wanted else (None, None)

    def backward(self, z, z_t, label, lse, mu, a, b):
        if _mapped(z, z_t, label, lse, mu, a, b):
            return super().backward(z, z_t, label, lse, mu, a, b)
        self._backward(z, z_t, label, a, b, lse, mu)
        return _bars(z, z_t, b)

    def _run_forward(self, z, z_t, label, a, b, wanted):
        out = _new_forward(z, z_t, label, a, b, wanted)
        row, _, lse, _ = out
        if z.shape[0] > 0:
            self._launch_forward(z, z_t, label, a, b, wanted, row, *((None, lse, None) if z_t is None else out[1:]))
        return out

    def _run_backward(self, z, z_t, label, a, b, lse, mu):
        if z.shape[0] > 0:
            self._launch_backward(z, z_t, label, a, b, lse, mu)


class LinearCrossEntropy:
    """The kernels of linear_cross_entropy, by sweeps with these rows."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def forward(self, x, aux, **options):
        return sweeps.forward(x, aux, row_kernels=self._rows, **options)

    def backward(self, x, aux, y, saved, y_bar, needs, **options):
        return sweeps.backward(x, aux, y, saved, y_bar, needs, row_kernels=self._rows, **options)

    def dual_forward(self, x, aux, x_t, **options):
        return sweeps.dual_forward(x, aux, x_t, row_kernels=self._rows, **options)

    def dual_backward(self, x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, **options):
        return sweeps.dual_backward(x, aux, x_t, y, y_t, saved, y_bar, y_t_bar, needs, needs_t, row_kernels=self._rows,
                                    **options)

    def double_backward(self, x, aux, x_t, y, saved, y_bar, needs, **options):
        return sweeps.double_backward(x, aux, x_t, y, saved, y_bar, needs, row_kernels=self._rows, **options)


def _mapped(*tensors: Tensor | None) -> bool:
    """Whether vmap maps over one: then nothing can be written in the place of the others."""
    return any(t is not None and is_wrapped(t) for t in tensors)


def _bars(z, z_t, b):
    """``dz, dz_t``, where they are."""
    return (z, None) if b is None else (z_t, z)


def _new_forward(z, z_t, *_):
    """``row, row_t, lse, mu``, not written; without elements what there is only with tangents."""
    return tuple(z.new_empty((z.shape[0], 1) if wanted else 0) for wanted in (True, z_t is not None) * 2)
