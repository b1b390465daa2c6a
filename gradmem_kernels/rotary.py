"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradmem_kernels import backend as backends
from gradmem_kernels.checks import FLOAT_DTYPES, Checker
from gradmem_kernels.linear_op import LinearOp

__all__ = ["rotary", "rotary_dual", "rotary_tables"]

OP = LinearOp("rotary")


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """Rotates the first ``r`` channels of ``x`` by position; the other ``d - r`` pass through.

    The pairs are ``(i, i + r/2)``, as in GPT-NeoX and Llama ("rotate half")::

        y[..., i]       = x[..., i]       * cos[..., i] - x[..., i + r/2] * sin[..., i]
        y[..., i + r/2] = x[..., i + r/2] * cos[..., i] + x[..., i]       * sin[..., i]

    The op is linear in ``x``: derivatives of every order exist.

    Args:
        x: ``[B, H, S, d]``, float64, float32, bfloat16 or float16. Half precision is computed in float32.
        cos: ``[S, r/2]`` or ``[B, S, r/2]`` with ``r <= d``, of x's dtype, or float32 beside half precision; a constant
            (see :func:`rotary_tables`).
        sin: like ``cos``.
        backend: ``"reference"``, ``"triton"``, ``"native"``, or ``None`` for the automatic choice.

    Returns:
        ``[B, H, S, d]``, of x's dtype.

    Raises:
        ArgumentError: for an argument of another type, shape, dtype or device, and for tables to be differentiated.
        BackendError: if ``backend`` is unknown or cannot serve.

    Source: Su et al., RoFormer, arXiv 2104.09864; docs/rotary.md.
    """
    _check("rotary", x, cos, sin)
    return _rotate(x, cos, sin, backend)


def rotary_dual(x: Tensor, cos: Tensor, sin: Tensor, x_t: Tensor | None, *,
                backend: str | None = None) -> tuple[Tensor, Tensor]:
    """:func:`rotary` and its tangent along ``x_t``: returns ``y, y_t``.

    ``x_t`` has the shape and dtype of ``x``; ``None`` is a known zero. Other arguments and errors as for
    :func:`rotary`; the op is its own dual, so here too derivatives of every order exist.
    """
    _check("rotary_dual", x, cos, sin).tangent("x_t", x_t, x)
    y = _rotate(x, cos, sin, backend)
    return y, torch.zeros_like(y) if x_t is None else _rotate(x_t, cos, sin, backend)


def rotary_tables(positions: Tensor, dim: int, theta: float = 10000.0,
                  dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """``cos, sin`` of ``positions * theta^(-2i/dim)``, ``i = 0 .. dim/2 - 1``, for :func:`rotary`.

    Args:
        positions: ``[..., S]``, of an integer or floating dtype. Angles are computed in float64.
        dim: number of rotated channels ``r``, even.
        theta: base of the frequencies, > 0.
        dtype: of the tables.

    Returns:
        Two tensors ``[..., S, dim/2]`` on the device of ``positions``.

    Raises:
        ArgumentError: for an argument of another type or value.
    """
    check = Checker("rotary_tables")
    check.tensor("positions", positions, ("...", "S"), dtypes=(torch.int64, torch.int32, *FLOAT_DTYPES))
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0 or dim % 2:
        check.fail("dim", "an even int >= 0", dim)
    check.number("theta", theta, above=0.0)
    if dtype not in FLOAT_DTYPES:
        check.fail("dtype", "a floating dtype", dtype)
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / max(dim, 1)
    angle = positions.detach().to(torch.float64)[..., None] * theta ** -exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backend: str | None) -> Tensor:
    kernels: Any = backends.select("rotary", backend, x)
    return OP(kernels.forward, kernels.transpose, x, cos, sin)


def _check(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> Checker:
    check = Checker(op)
    check.tensor("x", x, ("B", "H", "S", "d"))
    dtypes = (x.dtype, torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else (x.dtype,)
    batched = isinstance(cos, Tensor) and cos.ndim == 3
    for name, table in (("cos", cos), ("sin", sin)):
        check.tensor(name, table, ("B", "S", "r/2") if batched else ("S", "r/2"), dtypes=dtypes)
        if table.requires_grad or forward_ad.unpack_dual(table).tangent is not None:
            check.fail(name, "a constant", "a tensor that is being differentiated", f"pass {name}.detach()")
    if 2 * check.sizes["r/2"] > check.sizes["d"]:
        check.fail("cos", f"shape [..., r/2] with r <= d={check.sizes['d']}", list(cos.shape))
    if sin.dtype != cos.dtype:
        check.fail("sin", f"the dtype of cos, {cos.dtype}", sin.dtype)
    return check
