"""Named ranges around what the library does, for profilers; off until asked for (docs/profiling.md)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch.profiler import record_function

__all__ = ["named_range", "profile_ranges"]

DOMAIN = "gradmem"

_on = os.environ.get("GRADMEM_RANGES", "0") not in ("", "0")
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


@contextlib.contextmanager
def profile_ranges() -> Iterator[None]:
    """Names what the library does inside the ``with`` block: ops, their kernels, WRITE, READ, the outer backward pass.

    Each range is a ``torch.profiler.record_function`` and, where the package ``nvtx`` is installed, an NVTX range of
    the domain ``gradmem``. It holds for the whole process, all its threads: the backward pass has its own. The
    environment variable ``GRADMEM_RANGES=1`` has the same effect from the start.
    """
    global _on
    before, _on = _on, True
    try:
        yield
    finally:
        _on = before


def named_range(*parts: object) -> AbstractContextManager[None]:
    """A range called ``gradmem::`` and the ``parts``; nothing when ranges are off, or in what is being compiled."""
    if not _on or torch.compiler.is_compiling():
        return _NOTHING
    return _named_range(f"{DOMAIN}::{' '.join(map(str, parts))}")


@contextlib.contextmanager
def _named_range(name: str) -> Iterator[None]:
    with record_function(name), _nvtx_range()(name, domain=DOMAIN):
        yield


@functools.cache
def _nvtx_range() -> Callable[..., AbstractContextManager[object]]:
    """``nvtx.annotate``, or what does nothing where the package is missing."""
    if importlib.util.find_spec("nvtx") is None:
        return lambda name, domain: contextlib.nullcontext()
    return importlib.import_module("nvtx").annotate
