"""Root mean square normalisation, of a tensor or of the sum of two."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from gradmem_kernels import backend as backends
from gradmem_kernels.autograd import Op
from gradmem_kernels.checks import Checker

__all__ = ["add_rms_norm", "add_rms_norm_dual", "rms_norm", "rms_norm_dual"]

OP = Op("rms_norm", x=("x", "weight"), y=("y",))
ADD_OP = replace(OP, name="add_rms_norm", y=("y", "s"), addend="residual")


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, differentiable twice.

    Args:
        x: ``[..., D]``, float64, float32, bfloat16 or float16. Half precision is computed in float32.
        weight: ``[D]``, of x's dtype.
        eps: added to the mean square, >= 0.
        backend: ``"reference"``, ``"triton"``, ``"native"``, or ``None`` for the automatic choice.

    Returns:
        ``[..., D]``, of x's dtype.

    Raises:
        ArgumentError: for an argument of another type, shape, dtype or device.
        BackendError: if ``backend`` is unknown or cannot serve.
        HigherOrderError: when a third derivative is taken.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467; derivatives in docs/rms_norm.md.
    """
    _check("rms_norm", x, weight, eps)
    return OP(backends.select("rms_norm", backend, x, weight), (x, weight), eps=eps)[0]


def rms_norm_dual(x: Tensor, weight: Tensor, x_t: Tensor | None, *, eps: float = 1e-6,
                  backend: str | None = None) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm` and its tangent along ``x_t``: returns ``y, y_t``, differentiable once.

    ``x_t`` has the shape and dtype of ``x``; ``None`` is a known zero. Other arguments and errors as for
    :func:`rms_norm`; a second derivative raises ``HigherOrderError``.
    """
    check = _check("rms_norm_dual", x, weight, eps)
    check.tangent("x_t", x_t, x)
    kernels = backends.select("rms_norm", backend, x, weight)
    (y,), (y_t,) = OP.dual(kernels, (x, weight), (x_t, None), eps=eps)
    return y, y_t


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6,
                 backend: str | None = None) -> tuple[Tensor, Tensor]:
    """``s = x + residual, y = rms_norm(s, weight)`` in one pass: returns ``y, s``, differentiable twice.

    The values are those of the two steps. ``s`` is kept for the backward pass in the place of its terms, and the
    cotangents of ``y`` and ``s`` become that of both terms in one pass too.

    Args:
        x: as for :func:`rms_norm`.
        residual: of x's shape and dtype.
        weight, eps, backend: as for :func:`rms_norm`.

    Returns:
        Two tensors ``[..., D]``, of x's dtype.

    Raises:
        As :func:`rms_norm`.
    """
    _check("add_rms_norm", x, weight, eps, residual)
    kernels = backends.select("rms_norm", backend, x, weight)
    y, s = ADD_OP(kernels, (x, weight), addend=(residual,), eps=eps)
    return y, s


def add_rms_norm_dual(x: Tensor, residual: Tensor, weight: Tensor, x_t: Tensor | None, residual_t: Tensor | None, *,
                      eps: float = 1e-6, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`add_rms_norm` and its tangent along ``x_t, residual_t``: ``y, s, y_t, s_t``, differentiable once.

    Tangents have the shape and dtype of their primals; ``None`` is a known zero. Other arguments and errors as for
    :func:`add_rms_norm`; a second derivative raises ``HigherOrderError``.
    """
    check = _check("add_rms_norm_dual", x, weight, eps, residual)
    check.tangent("x_t", x_t, x)
    check.tangent("residual_t", residual_t, residual)
    kernels = backends.select("rms_norm", backend, x, weight)
    (y, s), (y_t, s_t) = ADD_OP.dual(kernels, (x, weight), (x_t, None), addend=(residual, residual_t), eps=eps)
    return y, s, y_t, s_t


def _check(op: str, x: Tensor, weight: Tensor, eps: float, *residual: Tensor) -> Checker:
    check = Checker(op)
    check.tensor("x", x, ("...", "D"))
    for t in residual:
        check.tensor("residual", t, ("...", "D"))
        check.same_shape("residual", t, "x", x)
    check.tensor("weight", weight, ("D",))
    check.number("eps", eps, minimum=0.0)
    return check
