"""Layer normalisation."""

from __future__ import annotations

from torch import Tensor

from gradmem_kernels import backend as backends
from gradmem_kernels.autograd import Op
from gradmem_kernels.checks import Checker

__all__ = ["layer_norm", "layer_norm_dual"]

OP = Op("layer_norm", x=("x", "weight", "bias"), y=("y",))


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


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Checker:
    check = Checker(op)
    check.tensor("x", x, ("...", "D"))
    check.tensor("weight", weight, ("D",))
    if bias is not None:
        check.tensor("bias", bias, ("D",))
    check.number("eps", eps, minimum=0.0)
    return check
