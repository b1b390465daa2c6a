"""The inner update: a step of gradient descent per sample, with clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradmem_kernels import backend as backends
from gradmem_kernels.autograd import Op, Tensors
from gradmem_kernels.checks import FLOAT_DTYPES, Checker, check_values

__all__ = ["inner_sgd", "inner_sgd_dual"]


def _keeps_x(x: Tensors, options: Mapping[str, Any]) -> tuple[bool, ...]:
    tensor_lr = x[2] is not None
    return False, tensor_lr or options["clip_value"] is not None or options["clip_norm"] is not None, tensor_lr


OP = Op("inner_sgd", x=("memory", "grad", "lr"), y=("next_memory",), keeps_x=_keeps_x)


def inner_sgd(memory: Tensor, grad: Tensor, lr: float | Tensor, *, clip_value: float | None = None,
              clip_norm: float | None = None, backend: str | None = None) -> Tensor:
    """``memory - lr * clip(grad)``, differentiable twice in memory, gradient and a tensor ``lr``.

    First ``grad`` is clamped to ``[-clip_value, clip_value]``; its derivative is 1 inside and on the bounds, 0 outside.
    Then, per sample, it is multiplied by ``clip_norm / (norm + 1e-6)`` where its norm over all dimensions but the first
    exceeds ``clip_norm``. With a number ``lr`` and no clipping nothing is kept for the backward pass.

    Args:
        memory: ``[B, ...]``, float64, float32, bfloat16 or float16. Half precision is computed in float32.
        grad: of memory's shape and dtype.
        lr: a finite number >= 0, or a tensor of any floating dtype that broadcasts to memory; a tensor may be negative.
            On other devices than the CPU its values are checked under ``GRADMEM_DEBUG=1`` only.
        clip_value: > 0, or ``None`` for no such clipping.
        clip_norm: > 0, or ``None`` for no such clipping.
        backend: ``"reference"``, ``"triton"``, ``"native"``, or ``None`` for the automatic choice.

    Returns:
        A tensor of memory's shape and dtype.

    Raises:
        ArgumentError: for an argument of another type, shape, dtype, device or value.
        BackendError: if ``backend`` is unknown or cannot serve.
        HigherOrderError: when a third derivative is taken.

    Source: the inner loop of Kuratov et al., arXiv 2603.13875; derivatives in docs/inner_sgd.md.
    """
    _check("inner_sgd", memory, grad, lr, clip_value, clip_norm)
    x, options = _arguments(memory, grad, lr, clip_value, clip_norm)
    return OP(backends.select("inner_sgd", backend, *x), x, **options)[0]


def inner_sgd_dual(memory: Tensor, grad: Tensor, lr: float | Tensor, memory_t: Tensor | None, grad_t: Tensor | None, *,
                   clip_value: float | None = None, clip_norm: float | None = None,
                   backend: str | None = None) -> tuple[Tensor, Tensor]:
    """:func:`inner_sgd` and its tangent along ``memory_t, grad_t``: returns both, differentiable once.

    Tangents have the shape and dtype of their primals; ``None`` is a known zero. Other arguments and errors as for
    :func:`inner_sgd`; a second derivative raises ``HigherOrderError``.
    """
    check = _check("inner_sgd_dual", memory, grad, lr, clip_value, clip_norm)
    check.tangent("memory_t", memory_t, memory)
    check.tangent("grad_t", grad_t, grad)
    x, options = _arguments(memory, grad, lr, clip_value, clip_norm)
    (y,), (y_t,) = OP.dual(backends.select("inner_sgd", backend, *x), x, (memory_t, grad_t, None), **options)
    return y, y_t


def _arguments(memory: Tensor, grad: Tensor, lr: float | Tensor, clip_value: float | None,
               clip_norm: float | None) -> tuple[Tensors, dict[str, Any]]:
    """The op's differentiable inputs and its options: a number ``lr`` is an option."""
    tensor, number = (lr, None) if isinstance(lr, Tensor) else (None, lr)
    return (memory, grad, tensor), {"lr": number, "clip_value": clip_value, "clip_norm": clip_norm}


def _check(op: str, memory: Tensor, grad: Tensor, lr: float | Tensor, clip_value: float | None,
           clip_norm: float | None) -> Checker:
    check = Checker(op)
    check.tensor("memory", memory, ("B", "..."))
    check.tensor("grad", grad, ("B", "..."))
    check.same_shape("grad", grad, "memory", memory)
    if isinstance(lr, Tensor):
        check.tensor("lr", lr, ("...",), dtypes=FLOAT_DTYPES)
        if lr.ndim > memory.ndim or any(s not in (1, m) for s, m in zip(lr.shape[::-1], memory.shape[::-1],
                                                                       strict=False)):
            check.fail("lr", f"a shape that broadcasts to memory's, {list(memory.shape)}", list(lr.shape))
        if check_values(lr) and not torch.isfinite(lr).all():
            check.fail("lr", "finite values", lr[~torch.isfinite(lr)][0].item())
    else:
        check.number("lr", lr, minimum=0.0)
    for name, bound in (("clip_value", clip_value), ("clip_norm", clip_norm)):
        if bound is not None:
            check.number(name, bound, above=0.0)
    return check
