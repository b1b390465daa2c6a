"""Learning rates of the inner steps: what they may be, and which of them a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradmem_kernels.checks import FLOAT_DTYPES, Checker, check_values

__all__ = ["LearningRate", "check_rates", "rate_of_step"]

LearningRate = float | Tensor | tuple[float | Tensor, ...]


def check_rates(check: Checker, lr: Any, memory: Tensor | Sequence[Tensor], steps: int) -> None:
    """Refuses an ``lr`` that does not fit ``steps`` steps of ``memory``, a tensor or a tuple of them."""
    tensors = (memory,) if isinstance(memory, Tensor) else tuple(memory)
    if isinstance(lr, tuple) and (isinstance(memory, Tensor) or len(lr) != len(tensors)):
        check.fail("lr", "no tuple, as memory is one tensor" if isinstance(memory, Tensor)
                   else f"a tuple of {len(tensors)} for a memory of as many tensors", f"a tuple of {len(lr)}")
    if isinstance(lr, Tensor) and lr.dim() > 1 and len({m.dim() for m in tensors}) > 1:
        check.fail("lr", "a tuple, one rate for each memory tensor, as these differ in rank", f"rank {lr.dim()}",
                   "a dimension would stand for steps in one and for samples in another")
    rates = lr if isinstance(lr, tuple) else (lr,) * len(tensors)
    for i, (rate, m) in enumerate(zip(rates, tensors, strict=True)):
        name = f"lr[{i}]" if isinstance(lr, tuple) else "lr"
        if not isinstance(rate, Tensor):
            check.number(name, rate, minimum=0.0)
            continue
        if rate.dim() == 1:
            check.sizes["steps"] = steps
            check.tensor(name, rate, ("steps",), dtypes=FLOAT_DTYPES, remedy="a 1-D lr has one entry for each step")
        else:
            shape = rate.shape[1:] if rate.dim() == m.dim() + 1 else rate.shape
            fits = len(shape) in (0, m.dim()) and all(a in (1, b) for a, b in zip(shape, m.shape, strict=False))
            if not fits or not rate.is_floating_point() or (rate.dim() > m.dim() and rate.shape[0] != steps):
                check.fail(name, f"a floating-point tensor that broadcasts to the memory, {list(m.shape)}, optionally "
                           f"behind a dimension of steps={steps}", f"{rate.dtype} of shape {list(rate.shape)}")
        if rate.device != m.device:
            check.fail(name, f"the device of the memory, {m.device}", rate.device)
        if check_values(rate) and not bool(rate.detach().isfinite().all()):
            check.fail(name, "finite values", "NaN or infinity")


def rate_of_step(lr: LearningRate, i: int, k: int, memory: Tensor) -> float | Tensor:
    """The learning rate of step ``k`` and of the ``i``-th memory tensor, ``memory``; a tensor keeps its dtype."""
    rate = lr[i] if isinstance(lr, tuple) else lr
    if not isinstance(rate, Tensor):
        return rate
    per_step = rate.dim() == 1 or rate.dim() == memory.dim() + 1
    return rate[k] if per_step else rate
