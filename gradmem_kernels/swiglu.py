"""The gated activation of SwiGLU feed-forward blocks."""

from __future__ import annotations

from torch import Tensor

from gradmem_kernels import backend as backends
from gradmem_kernels.autograd import Op
from gradmem_kernels.checks import Checker

__all__ = ["swiglu", "swiglu_dual"]

OP = Op("swiglu", x=("gate", "up"), y=("y",))


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """``y = silu(gate) * up`` with ``silu(x) = x * sigmoid(x)``, elementwise, differentiable twice.

    Args:
        gate: of any shape, float64, float32, bfloat16 or float16. Half precision is computed in float32.
        up: of gate's shape and dtype.
        backend: ``"reference"``, ``"triton"``, ``"native"``, or ``None`` for the automatic choice.

    Returns:
        A tensor of gate's shape and dtype.

    Raises:
        ArgumentError: for an argument of another type, shape, dtype or device.
        BackendError: if ``backend`` is unknown or cannot serve.
        HigherOrderError: when a third derivative is taken.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202; derivatives in docs/swiglu.md.
    """
    _check("swiglu", gate, up)
    return OP(backends.select("swiglu", backend, gate, up), (gate, up))[0]


def swiglu_dual(gate: Tensor, up: Tensor, gate_t: Tensor | None, up_t: Tensor | None, *,
                backend: str | None = None) -> tuple[Tensor, Tensor]:
    """:func:`swiglu` and its tangent along ``gate_t, up_t``: returns ``y, y_t``, differentiable once.

    Tangents have the shape and dtype of their primals; ``None`` is a known zero. Other arguments and errors as for
    :func:`swiglu`; a second derivative raises ``HigherOrderError``.
    """
    check = _check("swiglu_dual", gate, up)
    check.tangent("gate_t", gate_t, gate)
    check.tangent("up_t", up_t, up)
    (y,), (y_t,) = OP.dual(backends.select("swiglu", backend, gate, up), (gate, up), (gate_t, up_t))
    return y, y_t


def _check(op: str, gate: Tensor, up: Tensor) -> Checker:
    check = Checker(op)
    check.tensor("gate", gate, ("...",))
    check.tensor("up", up, ("...",))
    check.same_shape("up", up, "gate", gate)
    return check
