"""Which backend serves an op here, and why.

A backend is a package beside this file with one module per op, named like the op, that provides the four kernels of
:class:`gradmem_kernels.autograd.Kernels`. ``reference`` is plain PyTorch and serves every dtype and device. The
automatic choice takes the first backend of :data:`BACKENDS` that serves the call; a backend asked for by name that
cannot serve raises and says why. There is no silent fallback.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import NamedTuple, cast

from torch import Tensor

from gradmem_kernels.autograd import Kernels

__all__ = ["BACKENDS", "OPS", "BackendError", "Choice", "explain", "requested", "select", "use_backend"]

#: In order of preference. Fused kernels come first as they arrive.
BACKENDS = ("triton", "native", "reference")

OPS = ("attention", "rms_norm", "layer_norm", "swiglu", "gelu", "rotary", "linear_cross_entropy", "inner_sgd")

_requested: str | None = os.environ.get("GRADMEM_BACKEND") or None
_loaded: dict[tuple[str, str], Kernels] = {}


class BackendError(RuntimeError):
    """A backend is unknown, or cannot serve what it was asked for by name."""


class Choice(NamedTuple):
    """One row of :func:`explain`."""

    op: str
    backend: str
    reason: str


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Asks for a backend by name in every op call inside the ``with`` block (``None``: the automatic choice).

    A call's own ``backend=`` goes before this, and this before the environment variable ``GRADMEM_BACKEND``. It holds
    for the whole process, all its threads.

    Raises:
        BackendError: if ``name`` is unknown.
    """
    global _requested
    _check_name(name)
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def select(op: str, backend: str | None, *tensors: Tensor | None) -> Kernels:
    """The kernels that serve ``op`` for these tensors.

    Raises:
        BackendError: if the backend asked for is unknown or cannot serve, with the reason.
    """
    name = _requested if backend is None else backend
    _check_name(name)
    if name is not None:
        reason = _refusal(name, op, tensors)
        if reason is not None:
            raise BackendError(f"{op}: backend: {name!r} cannot serve this call: {reason}; pass backend=None for the "
                               f"automatic choice, or another of {', '.join(BACKENDS)}")
        return _load(name, op)
    return _load(next(b for b in BACKENDS if _passed_over(b, op, tensors) is None), op)


def requested() -> str | None:
    """The backend that :func:`use_backend` or ``GRADMEM_BACKEND`` asks for."""
    return _requested


def explain(*tensors: Tensor) -> list[Choice]:
    """What serves each op here (given such tensors, if any), and why; a backend asked for that cannot is said so."""
    rows = []
    for op in OPS:
        if _requested is not None:
            known = _requested in BACKENDS
            reason = _refusal(_requested, op, tensors) if known else f"unknown, expected one of {', '.join(BACKENDS)}"
            rows.append(Choice(op, _requested if reason is None else "none",
                               "asked for by name" if reason is None else f"{_requested}: {reason}"))
            continue
        passed_over: list[str] = []
        for name in BACKENDS:
            reason = _passed_over(name, op, tensors)
            if reason is None:
                rows.append(Choice(op, name, "; ".join(passed_over) or "first choice"))
                break
            passed_over.append(f"{name}: {reason}")
    return rows


def _check_name(name: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise BackendError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")


def _refusal(name: str, op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why backend ``name`` cannot serve ``op`` for ``tensors``; ``None`` if it can."""
    module = f"gradmem_kernels.{name}"
    if (name, op) not in _loaded and (
            importlib.util.find_spec(module) is None or importlib.util.find_spec(f"{module}.{op}") is None):
        return f"this version has no {name} kernels for {op}"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it has wheels for Linux on x86-64 and arm64"
    refusal = getattr(_load(name, op), "refusal", None)
    return refusal(*tensors) if refusal is not None else None


def _passed_over(name: str, op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why the automatic choice leaves this backend out; ``None`` if it does not."""
    if name == "native" and any(t is not None and t.is_cuda for t in tensors):
        return _refusal(name, op, tensors) or "its CUDA kernels were never measured; they serve when asked for by name"
    return _refusal(name, op, tensors)


def _load(name: str, op: str) -> Kernels:
    if (name, op) not in _loaded:
        _loaded[name, op] = cast(Kernels, importlib.import_module(f"gradmem_kernels.{name}.{op}"))
    return _loaded[name, op]
