"""What the build of this installation decided and with what it compiled: setup.py stores it beside this file."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gradmem_kernels.native.driver import driver

__all__ = ["build_info", "missing"]

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]


@functools.cache
def build_info() -> dict[str, Any] | None:
    """``None`` where nothing was built: a source tree."""
    path = _HERE / "build_info.json"
    return json.loads(path.read_text()) if path.is_file() else None


@functools.cache
def missing(module: str) -> str | None:
    """Why this installation has no compiled ``module``; ``None`` if it has it."""
    name = f"gradmem_kernels.native.{module}"
    reason = _reason(module) if find_spec(name) is None else None
    if reason is None and (module != "_cuda" or driver() is not None):  # CUDA's is loaded only where it can run
        try:
            import_module(name)
        except ImportError as error:
            reason = f"loading them fails: {error}"
    kind = "CUDA" if module == "_cuda" else "CPUs"
    return None if reason is None else f"this installation has no compiled kernels for {kind}: {reason}"


def _reason(module: str) -> str:
    info = build_info()
    if info is None:
        if not (_ROOT / "CMakeLists.txt").is_file():
            return "its build left no record"
        installed = _installed_elsewhere(module)
        if installed is None:
            return f"nothing was built in the source tree {_ROOT}, from which it is imported; pip install -e {_ROOT}"
        shadows = f"the source tree {_ROOT} hides the installed package in {installed}; start Python elsewhere"
        warnings.warn(f"gradmem_kernels has no compiled kernels: {shadows}", RuntimeWarning, stacklevel=2)
        return shadows
    reason = info["native_refusal"] or (info["cuda_refusal"] if module == "_cuda" else "")
    if reason:
        return reason if reason.startswith("this version") else f"when it was built, {reason}"
    return (f"it was built for Python {info['python']} on {info['platform']}, and this is Python "
            f"{platform.python_version()} on {platform.machine()}")


def _installed_elsewhere(module: str) -> Path | None:
    for distribution in importlib.metadata.distributions(name="gradmem-kernels"):
        folder = Path(str(distribution.locate_file("gradmem_kernels"))).resolve()
        if folder != _HERE.parent and any((folder / "native").glob(f"{module}.*")):
            return folder
    return None
