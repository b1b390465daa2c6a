"""What the reference kernels share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def wide(t: Tensor | None) -> Tensor | None:
    """Half precision is computed in float32."""
    return t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two terms, either of which may be a known zero."""
    return b if a is None else a if b is None else a + b


def mul(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The product of two factors, either of which may be a known zero."""
    return None if a is None or b is None else a * b


def cast(t: Tensor | None, like: Tensor) -> Tensor:
    """``t`` in the dtype of ``like``; a known zero as zeros of its shape."""
    return torch.zeros_like(like) if t is None else t.to(like.dtype)


def rows(t: Tensor | None) -> Tensor | None:
    """``[..., D]`` as ``[rows, D]``."""
    return None if t is None else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def sum_rows(t: Tensor | None) -> Tensor | None:
    """The sum over all dimensions but the last."""
    return None if t is None else rows(t).sum(0)


def add_(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """:func:`add` in the place of ``a``, a temporary."""
    return add(a, b) if a is None or b is None or is_wrapped(b) else a.add_(b)


def sub_(a: Tensor, b: Tensor) -> Tensor:
    """``a - b`` in the place of ``a``, a temporary."""
    return a - b if is_wrapped(b) else a.sub_(b)


def mul_(a: Tensor, b: Tensor) -> Tensor:
    """``a * b`` in the place of ``a``, a temporary."""
    return a * b if is_wrapped(b) else a.mul_(b)


def addcmul_(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + a * b`` in the place of ``total``, a temporary."""
    if total is None:
        return a * b
    return total + a * b if any(map(is_wrapped, (total, a, b))) else total.addcmul_(a, b)


def addmm_(total: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """``total + a @ b`` in the place of ``total``, a temporary; ``None`` is a known zero."""
    if a is None or b is None:
        return total
    if total is None:
        return a @ b
    return total + a @ b if any(map(is_wrapped, (total, a, b))) else total.addmm_(a, b)


def by_samples(kernel: Callable[..., tuple[Tensor | None, ...]], size: int,
               *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """``kernel(*tensors)`` on ``size`` samples (entries of the first dimension) at a time.

    On a CPU temporaries then stay in its cache, and elsewhere they stay small.
    """
    batch = next(t.shape[0] for t in tensors if t is not None)
    size = max(1, size)
    if size >= batch or any(t is not None and is_wrapped(t) for t in tensors):
        return kernel(*tensors)
    out: list[Tensor | None] | None = None
    for i in range(0, batch, size):
        part = kernel(*(None if t is None else t[i : i + size] for t in tensors))
        if out is None:
            out = [None if p is None else p.new_empty(batch, *p.shape[1:]) for p in part]
        for whole, p in zip(out, part, strict=True):
            if whole is not None:
                whole[i : i + size] = p
    return tuple(out or ())


def is_wrapped(t: Tensor) -> bool:
    """Whether vmap may map over ``t``: such a tensor cannot be written into one that is not mapped over.

    ``autograd.grad(is_grads_batched=True)`` has batched tensors of its own. What ``torch.compile`` traces is neither.
    """
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)
