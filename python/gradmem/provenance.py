"""Where and when a number was measured, and with what.

The rows of benchmarks say the same by a class of their own, which also runs beside older revisions of this package.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

__all__ = ["ROOT", "Provenance"]

#: The checkout, where this is one.
ROOT = Path(__file__).parents[2]
_RESULTS = "benchmarks/results"

#: Environment variables that decide how memory is served on a CPU.
ALLOCATION = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_")
#: And all that change the speed or the memory of a run.
ENVIRONMENT = (*ALLOCATION, "GRADMEM_", "KMP_", "MKL_", "OMP_", "PYTORCH_", "TRITON_")


@dataclass(frozen=True)
class Provenance:
    """Where and when a number was measured, and with what."""

    device: str
    threads: int
    python: str
    torch: str
    triton: str | None
    #: Version of the GPU's driver, and of the CUDA that torch was built with; None on a CPU.
    driver: str | None
    commit: str | None
    modified: bool
    date: str
    environment: Mapping[str, str]
    cuda: str | None = None
    #: The C library that serves memory on a CPU, and what its settings are; None on a GPU.
    allocator: str | None = None

    @classmethod
    def here(cls, device: str = "cpu") -> Provenance:
        """The provenance of this process. ``modified``: the tree differs from ``commit``, stored results aside.

        Where git tells nothing, the environment variable ``GRADMEM_COMMIT`` names the commit.
        """
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            triton = None
        gpu = torch.device(device).type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(device) if gpu else _cpu_model(), threads=torch.get_num_threads(),
            python=platform.python_version(), torch=torch.__version__, triton=triton,
            driver=_gpu_driver() if gpu else None, cuda=torch.version.cuda if gpu else None,
            commit=_git("rev-parse", "HEAD") or os.environ.get("GRADMEM_COMMIT") or None,
            modified=bool(_git("status", "--porcelain", "--", ".", f":(exclude){_RESULTS}")),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT)},
            allocator=None if gpu else _allocator())


def _git(*args: str) -> str | None:
    """What git says of the checkout; ``None`` without git, or outside one, as in an installed package."""
    if shutil.which("git") is None or not (ROOT / _RESULTS).is_dir():
        return None
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu_driver() -> str | None:
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", version.read_text()) if version.exists() else None
    return found.group() if found else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _allocator() -> str:
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(ALLOCATION) and v]
    library = " ".join(platform.libc_ver()).strip() or "C library"
    return f"{library}, {' '.join(settings) or 'default settings'}"
