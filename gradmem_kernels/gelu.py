"""The Gaussian error linear unit."""

from __future__ import annotations

from torch import Tensor

from gradmem_kernels import backend as backends
from gradmem_kernels.autograd import Op
from gradmem_kernels.checks import Checker

__all__ = ["gelu", "gelu_dual"]

OP = Op("gelu", x=("x",), y=("y",))


def gelu(x: Tensor, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """``y = x * Phi(x)`` with the normal distribution function ``Phi``, elementwise, differentiable twice.

    Args:
        x: of any shape, float64, float32, bfloat16 or float16. Half precision is computed in float32.
        approximate: ``"none"``, or ``"tanh"`` for ``Phi(x) = (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3))) / 2``.
        backend: ``"reference"``, ``"triton"``, ``"native"``, or ``None`` for the automatic choice.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        ArgumentError: for an argument of another type, dtype or value.
        BackendError: if ``backend`` is unknown or cannot serve.
        HigherOrderError: when a third derivative is taken.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415; derivatives in docs/gelu.md.
    """
    _check("gelu", x, approximate)
    return OP(backends.select("gelu", backend, x), (x,), approximate=approximate)[0]


def gelu_dual(x: Tensor, x_t: Tensor | None, *, approximate: str = "none",
              backend: str | None = None) -> tuple[Tensor, Tensor]:
    """:func:`gelu` and its tangent along ``x_t``: returns ``y, y_t``, differentiable once.

    ``x_t`` has the shape and dtype of ``x``; ``None`` is a known zero. Other arguments and errors as for :func:`gelu`;
    a second derivative raises ``HigherOrderError``.
    """
    _check("gelu_dual", x, approximate).tangent("x_t", x_t, x)
    (y,), (y_t,) = OP.dual(backends.select("gelu", backend, x), (x,), (x_t,), approximate=approximate)
    return y, y_t


def _check(op: str, x: Tensor, approximate: str) -> Checker:
    check = Checker(op)
    check.tensor("x", x, ("...",))
    if approximate not in ("none", "tanh"):
        check.fail("approximate", "'none' or 'tanh'", repr(approximate))
    return check
