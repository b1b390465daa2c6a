"""What is installed here, what was compiled for it, and which backend serves each op."""

from __future__ import annotations

import importlib.metadata
import platform
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import gradmem_kernels
from gradmem_kernels import backend
from gradmem_kernels.native.build_info import build_info, missing
from gradmem_kernels.native.common import cpu
from gradmem_kernels.native.driver import driver, too_old
from gradmem_kernels.native.kernel_attributes import KernelAttributes, kernel_attributes
from gradmem_kernels.vendor.attention import automatic_choice

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
        like = torch.zeros(1, device=device)
        for choice in backend.explain(like):
            table.add_row(*choice)
        console.print(table)
        if backend.requested() is None:
            first_order = automatic_choice(backend.select("attention", None, like), like.device)
            console.print(f"attention's first order on {device}: "
                          f"{'its own kernels' if first_order == 'own' else f'{first_order} where it serves'}")


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
    for architecture, kernels in _attributes().items():
        table.add_row(f"CUDA kernels, {architecture}", kernels)
    table.add_row("driver", "none" if found is None else old or f"for CUDA {found[0]}.{found[1]}")
    for name in ("python", "platform", "compiler", "pybind11", "cmake"):
        if name in info:
            table.add_row(name, info[name])
    for name, value in info.items():
        if name.startswith("flags"):
            table.add_row(name, value)
    return table


def _attributes() -> dict[str, str]:
    """For each architecture of the CUDA module, what its kernels take; all of them: ``compile-report --cuda``."""
    spec = find_spec("gradmem_kernels.native._cuda")
    if spec is None or spec.origin is None:
        return {}
    try:
        kernels = kernel_attributes(Path(spec.origin))
    except FileNotFoundError as error:
        return {"attributes": str(error)}
    by_architecture: dict[str, list[KernelAttributes]] = {}
    for name, kernel in kernels.items():
        by_architecture.setdefault(name.rpartition(" ")[2], []).append(kernel)
    return {architecture: f"{len(found)}, each {min(registers)} to {max(registers)} registers and at most "
                          f"{max(k.stack for k in found)} bytes of stack per thread"
            for architecture, found in by_architecture.items() if (registers := [k.registers for k in found])}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
