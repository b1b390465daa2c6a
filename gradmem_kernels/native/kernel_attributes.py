"""What CUDA C++ kernels compiled to: registers, stack and shared memory, read off the compiled module without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

__all__ = ["KernelAttributes", "kernel_attributes"]


class KernelAttributes(NamedTuple):
    """What one kernel takes: registers and bytes of stack of a thread, and bytes of shared memory of a block, less what
    its launch asks for.
    """

    registers: int
    stack: int
    shared: int


_ARCHITECTURE = re.compile(r"^arch = (sm_\w+)$")
_FUNCTION = re.compile(r"^ *Function (\S+):$")
_USAGE = re.compile(r"\bREG:(\d+) STACK:(\d+) SHARED:(\d+)\b")


def kernel_attributes(*modules: Path) -> dict[str, KernelAttributes]:
    """What each kernel of compiled modules takes, by its name and architecture: ``"norm_forward_kernel<float> sm_80"``.

    Raises:
        FileNotFoundError: where there is no ``cuobjdump`` or ``c++filt``.
    """
    lines: dict[str, KernelAttributes] = {}
    for module in modules:
        lines |= parse(subprocess.run([_cuobjdump(), "-res-usage", module], capture_output=True, text=True,
                                      check=True).stdout)
    names = subprocess.run(["c++filt"], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    found = dict(zip(map(readable, names.splitlines()), lines.values(), strict=True))
    if len(found) != len(lines):
        raise ValueError("two kernels have one readable name")
    return dict(sorted(found.items()))


def parse(usage: str) -> dict[str, KernelAttributes]:
    """By mangled name and architecture, ``"name sm_80"``, from what ``cuobjdump -res-usage`` prints."""
    lines: dict[str, KernelAttributes] = {}
    architecture = function = ""
    for text in usage.splitlines():
        if found := _ARCHITECTURE.match(text.strip()):
            architecture = found[1]
        elif found := _FUNCTION.match(text):
            function = found[1]
        elif found := _USAGE.search(text):
            lines[f"{function} {architecture}"] = KernelAttributes(*map(int, found.groups()))
    if not lines or not architecture:
        raise ValueError(f"cuobjdump -res-usage: expected kernels, got {usage[:200]!r}")
    return lines


def readable(name: str) -> str:
    """A demangled name without namespaces, what the kernel returns and its parameters."""
    name, _, architecture = name.rpartition(" ")
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\b(\w+::)+", "", re.sub(r"\((\w+::)*(\w+)\)(\d)", r"\2 \3", name))
    return f"{re.sub(r'[(].*$', '', name)} {architecture}"


def _cuobjdump() -> str:
    """That of PATH or of CUDA's toolkit, or the one that Triton's wheel carries."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [str(Path(home, "bin")) for home in homes if home]
    spec = find_spec("triton")
    folders += [str(Path(folder, "backends/nvidia/bin")) for folder in spec.submodule_search_locations or ()] if (
        spec) else []
    for path in (None, *folders):
        if found := shutil.which("cuobjdump", path=path):
            return found
    raise FileNotFoundError("cuobjdump: neither in PATH nor CUDA's toolkit, nor is Triton installed, whose wheel has "
                            "one")
