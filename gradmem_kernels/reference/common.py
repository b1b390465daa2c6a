"""What the reference kernels share."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(t: Tensor | None) -> Tensor | None:
    """Half precision is computed in float32."""
    return t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two terms, either of which may be a known zero."""
    return b if a is None else a if b is None else a + b


def sub_(a: Tensor, b: Tensor) -> Tensor:
    """``a - b`` in the place of ``a``, a temporary."""
    return a - b if _is_wrapped(b) else a.sub_(b)


def mul_(a: Tensor, b: Tensor) -> Tensor:
    """``a * b`` in the place of ``a``, a temporary."""
    return a * b if _is_wrapped(b) else a.mul_(b)


def _is_wrapped(t: Tensor) -> bool:
    """Whether ``torch.func`` may map over ``t``: such a tensor cannot be written into one that is not mapped over."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)
