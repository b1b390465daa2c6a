"""What is installed here, what was compiled for it, and which backend serves each op."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.table import Table

import gradmem_kernels
from gradmem_kernels import backend
from gradmem_kernels.native.build_info import build_info, missing
from gradmem_kernels.native.common import cpu
from gradmem_kernels.native.driver import driver, too_old
from gradmem_kernels.vendor.attention import DEFAULTS

__all__ = ["doctor"]

_OPTIONAL = ("triton", "nvtx", "transformers", "matplotlib")
_NEEDED = ("numpy", "safetensors", "typer", "rich")


def doctor(console: Console) -> None:
    """Prints versions, compiled kernels, and for each device the backend of every op and what is against others."""
    versions = Table(title="versions")
    versions.add_column("package")
    versions.add_column("version")
    versions.add_row("gradmem-kernels", gradmem_kernels.__version__)
    versions.add_row("python", platform.python_version())
    versions.add_row("torch", torch.__version__)
    for name in _NEEDED + _OPTIONAL:
        versions.add_row(name, _version(name))
    console.print(versions)
    console.print(_compiled())

    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    for device, description in devices.items():
        table = Table(title=f"backends on {device} ({description}), float32")
        for column in ("op", "backend", "why"):
            table.add_column(column)
        for choice in backend.explain(torch.zeros(1, device=device)):
            table.add_row(*choice)
        console.print(table)
        if backend.requested() is None:
            first_order = DEFAULTS.get(device.partition(":")[0], "own")
            console.print(f"attention's first order on {device}: {first_order} where it serves")


def _compiled() -> Table:
    """Of the compiled modules: what they run on here, and how they were built or why they were not."""
    info = build_info() or {}
    table = Table(title="compiled kernels")
    table.add_column("what")
    table.add_column("here")
    why_not = missing("_cpu")
    table.add_row("for CPUs", why_not or f"{cpu().instruction_set()}, of {', '.join(cpu().instruction_sets())}")
    toolkit, found = info.get("cuda_toolkit"), driver()
    old = too_old(toolkit) if toolkit else None
    architectures = f"compiled for {', '.join(info.get('cuda_architectures', ()))}"
    table.add_row("for CUDA", missing("_cuda") or old or architectures)
    table.add_row("CUDA toolkit of the build", toolkit or "none")
    table.add_row("driver", "none" if found is None else old or f"for CUDA {found[0]}.{found[1]}")
    for name in ("python", "platform", "compiler", "pybind11", "cmake"):
        if name in info:
            table.add_row(name, info[name])
    for name, value in info.items():
        if name.startswith("flags"):
            table.add_row(name, value)
    return table


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
