"""What a GPU would run and hold, found without one: PyTorch's meta device with the Triton operators' sizes."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from gradmem_kernels import backend as backends

__all__ = ["triton_on_meta"]


@contextmanager
def triton_on_meta() -> Iterator[None]:
    """Inside, ops on the meta device call the Triton kernels that a GPU would: operators whose results have sizes and
    no values. The backend would otherwise refuse that device, and the reference kernels hold more.

    Raises:
        SystemExit: where Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("on the meta device: expected Triton, whose operators tell sizes, got none; install it")
    select = backends.select

    def as_on_a_gpu(op: str, backend: str | None, *tensors: Any) -> Any:
        module = f"gradmem_kernels.triton.{op}"
        on_meta = any(t is not None and t.device.type == "meta" for t in tensors)
        if backend is None and on_meta and importlib.util.find_spec(module) is not None:
            return importlib.import_module(module)
        return select(op, backend, *tensors)

    with mock.patch.object(backends, "select", as_on_a_gpu):
        yield
