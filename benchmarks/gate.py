"""The gate: who computes what plain PyTorch does, about as exactly, gets numbers; and what keeps the others from it."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gradmem_kernels.backend import BackendError

__all__ = ["Found", "Result", "attempt", "compared", "errors", "gate", "relative_errors", "release"]

#: A provider may be this many times less exact than plain PyTorch in the same dtype, both against float64.
ERROR_FACTOR = 4.0
#: A loss and the gradients of it, by name.
Result = tuple[Tensor, dict[str, Tensor]]


class Found(NamedTuple):
    """Of a provider: its largest error and plain PyTorch's, and peak memory; or why it gets no numbers."""

    error: float | None = None
    eager_error: float | None = None
    peak: int | None = None
    unavailable: str | None = None
    wrong: str | None = None

    @property
    def usable(self) -> bool:
        return self.unavailable is None and self.wrong is None


def errors(results: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Of each result: the norm of the difference over the norm of the exact one. What is exactly zero has to be zero.

    Raises:
        ValueError: if a result has another shape, which the difference could hide.
    """
    found = {}
    for name, t in results.items():
        if t.shape != exact[name].shape:
            raise ValueError(f"{name}: expected shape {list(exact[name].shape)}, got {list(t.shape)}")
        off, size = float((t.detach().double() - exact[name]).norm()), float(exact[name].norm())
        found[name] = off / size if size else 0.0 if off == 0 else math.inf
    return found


def relative_errors(result: Result, exact: Result) -> dict[str, float]:
    """:func:`errors` of the loss and of each gradient."""
    (loss, grads), (exact_loss, exact_grads) = result, exact
    if grads.keys() != exact_grads.keys():
        raise ValueError(f"gradients: expected {sorted(exact_grads)}, got {sorted(grads)}")
    return errors({"loss": loss} | grads, {"loss": exact_loss} | exact_grads)


def gate(name: str, errors: Mapping[str, float], eager: Mapping[str, float]) -> str | None:
    """Why the provider gets no time; ``None`` if it computes what plain PyTorch does, about as exactly."""
    eps = torch.finfo(torch.float32).eps
    bad = [f"{what}: {error:.1e}, plain PyTorch {eager[what]:.1e}" for what, error in errors.items()
           if not error <= ERROR_FACTOR * (eager[what] + eps)]  # written so that NaN is bad
    return f"{name}: wrong against float64: {'; '.join(bad[:4])}" if bad else None


def compared(name: str, ours: Mapping[str, float], eager: Mapping[str, float]) -> Found:
    """A provider's errors, through the gate."""
    return Found(max(ours.values()), max(eager[what] for what in ours), wrong=gate(name, ours, eager))


def attempt(name: str, work: Callable[[], Found]) -> Found:
    """``work()``, or what keeps it from running. An error of the library's own, other than that a backend does not
    serve, counts as wrong."""
    try:
        found = work()
    except torch.OutOfMemoryError:
        found = Found(unavailable="out of memory")
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        ours = name.startswith("gradmem") and not isinstance(error, BackendError)
        found = Found(wrong=f"{name}: {reason}") if ours else Found(unavailable=reason)
    release()
    return found


def release() -> None:
    """Frees what is garbage, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
