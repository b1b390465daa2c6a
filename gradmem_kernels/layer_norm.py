"""Layer normalisation, of a tensor or of the sum of two."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from gradmem_kernels import backend as backends
from gradmem_kernels.autograd import Op
from gradmem_kernels.checks import Checker

__all__ = ["add_layer_norm", "add_layer_norm_dual", "layer_norm", "layer_norm_dual"]

OP = Op("layer_norm", x=("x", "weight", "bias"), y=("y",))
ADD_OP = replace(OP, name="add_layer_norm", y=("y", "s"), addend="residual")


def layer_norm(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, eps: float = 1e-5,
               backend: str | None = None) -> Tensor:
    """``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension, differentiable twice.

    ``var`` is the mean square deviation (divided by D).

    Args:
        x: ``[..., D]``, float64, float32, bfloat16 or float16. Half precision is computed in float32.
        weight: ``[D]``, of x's dtype.
        bias: ``[D]``, of x's dtype.
        eps: added to the variance, >= 0.
        backend: ``"reference"``, ``"triton"``, ``"native"``, or ``None`` for the automatic choice.

    Returns:
        ``[..., D]``, of x's dtype.

    Raises:
        ArgumentError: for an argument of another type, shape, dtype or device.
        BackendError: if ``backend`` is unknown or cannot serve.
        HigherOrderError: when a third derivative is taken.

    Source: Ba, Kiros and Hinton, Layer Normalization, arXiv 1607.06450; derivatives in docs/layer_norm.md.
    """
    _check("layer_norm", x, weight, bias, eps)
    return OP(backends.select("layer_norm", backend, x, weight, bias), (x, weight, bias), eps=eps)[0]


def layer_norm_dual(x: Tensor, weight: Tensor, x_t: Tensor | None, *, bias: Tensor | None = None, eps: float = 1e-5,
                    backend: str | None = None) -> tuple[Tensor, Tensor]:
    """:func:`layer_norm` and its tangent along ``x_t``: returns ``y, y_t``, differentiable once.

    ``x_t`` has the shape and dtype of ``x``; ``None`` is a known zero. Other arguments and errors as for
    :func:`layer_norm`; a second derivative raises ``HigherOrderError``.
    """
    check = _check("layer_norm_dual", x, weight, bias, eps)
    check.tangent("x_t", x_t, x)
    kernels = backends.select("layer_norm", backend, x, weight, bias)
    (y,), (y_t,) = OP.dual(kernels, (x, weight, bias), (x_t, None, None), eps=eps)
    return y, y_t


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, *, bias: Tensor | None = None, eps: float = 1e-5,
                   backend: str | None = None) -> tuple[Tensor, Tensor]:
    """``s = x + residual, y = layer_norm(s, weight, bias)`` in one pass: returns ``y, s``, differentiable twice.

    The values are those of the two steps. ``s`` is kept for the backward pass in the place of its terms, and the
    cotangents of ``y`` and ``s`` become that of both terms in one pass too.

    Args:
        x: as for :func:`layer_norm`.
        residual: of x's shape and dtype.
        weight, bias, eps, backend: as for :func:`layer_norm`.

    Returns:
        Two tensors ``[..., D]``, of x's dtype.

    Raises:
        As :func:`layer_norm`.
    """
    _check("add_layer_norm", x, weight, bias, eps, residual)
    kernels = backends.select("layer_norm", backend, x, weight, bias)
    y, s = ADD_OP(kernels, (x, weight, bias), addend=(residual,), eps=eps)
    return y, s


def add_layer_norm_dual(x: Tensor, residual: Tensor, weight: Tensor, x_t: Tensor | None, residual_t: Tensor | None, *,
                        bias: Tensor | None = None, eps: float = 1e-5,
                        backend: str | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`add_layer_norm` and its tangent along ``x_t, residual_t``: ``y, s, y_t, s_t``, differentiable once.

    Tangents have the shape and dtype of their primals; ``None`` is a known zero. Other arguments and errors as for
    :func:`add_layer_norm`; a second derivative raises ``HigherOrderError``.
    """
    check = _check("add_layer_norm_dual", x, weight, bias, eps, residual)
    check.tangent("x_t", x_t, x)
    check.tangent("residual_t", residual_t, residual)
    kernels = backends.select("layer_norm", backend, x, weight, bias)
    (y, s), (y_t, s_t) = ADD_OP.dual(kernels, (x, weight, bias), (x_t, None, None), addend=(residual, residual_t),
                                     eps=eps)
    return y, s, y_t, s_t


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *residual: Tensor) -> Checker:
    check = Checker(op)
    check.tensor("x", x, ("...", "D"))
    for t in residual:
        check.tensor("residual", t, ("...", "D"))
        check.same_shape("residual", t, "x", x)
    check.tensor("weight", weight, ("D",))
    if bias is not None:
        check.tensor("bias", bias, ("D",))
    check.number("eps", eps, minimum=0.0)
    return check
