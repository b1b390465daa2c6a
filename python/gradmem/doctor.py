"""What is installed here, and which backend serves each op."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.table import Table

import gradmem_kernels
from gradmem_kernels import backend
from gradmem_kernels.vendor.attention import DEFAULTS

__all__ = ["doctor"]

_OPTIONAL = ("triton", "nvtx", "transformers", "matplotlib")
_NEEDED = ("numpy", "safetensors", "typer", "rich")


def doctor(console: Console) -> None:
    """Prints versions, devices, and for each device the backend of every op, with the reasons against the others."""
    versions = Table(title="versions")
    versions.add_column("package")
    versions.add_column("version")
    versions.add_row("gradmem-kernels", gradmem_kernels.__version__)
    versions.add_row("python", platform.python_version())
    versions.add_row("torch", torch.__version__)
    for name in _NEEDED + _OPTIONAL:
        versions.add_row(name, _version(name))
    console.print(versions)

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


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
