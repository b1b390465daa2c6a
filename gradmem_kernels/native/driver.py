"""NVIDIA's driver, asked without CUDA's runtime: a module that was compiled by a newer toolkit cannot tell."""

from __future__ import annotations

import ctypes
import functools

__all__ = ["driver", "too_old"]


@functools.cache
def driver() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows; ``None`` if there is no driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def too_old(toolkit: str) -> str | None:
    """Why the driver does not run what this toolkit compiled; ``None`` if it does. A major version is compatible."""
    found = driver()
    needed = int(toolkit.partition(".")[0])
    if found is None or found[0] >= needed:
        return None
    return (f"the driver knows CUDA {found[0]}.{found[1]} and is too old for kernels that CUDA {toolkit} compiled, "
            f"which need one for CUDA {needed}.0: update the driver, or build with an older toolkit")
