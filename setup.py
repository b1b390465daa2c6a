"""The compiled modules, which CMake builds; everything else about the distribution is declared in pyproject.toml.

What is compiled follows from switches in the environment and from what this machine has, never from a visible GPU. pip
hides what a build prints, so that the decision is stored in the package, where ``gradmem doctor`` finds it.

    GRADMEM_NATIVE=auto|on|off      compiled kernels: where there is a compiler, or else stop, or none
    GRADMEM_CUDA=auto|on|off        those for CUDA: where there is nvcc, or else stop, or none
    GRADMEM_CUDA_ARCHS="80;90a"     architectures that nvcc compiles for
    MAX_JOBS                        compilers at a time
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "gradmem_kernels.native"
INFO = "build_info.json"
#: Of another compiler or other flags, CMake keeps what it knew: it has to start afresh.
FRESH_FOR = ("CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX")
#: CuTe's, in headers that a package carries.
CUTLASS = "nvidia-cutlass>=4.2"


class Cuda(NamedTuple):
    nvcc: str | None
    toolkit: str | None
    architectures: list[str]
    reason: str  # why CUDA kernels are not compiled; empty if they are


def switch(name: str) -> str:
    value = os.environ.get(name, "auto").strip().lower() or "auto"
    if value not in ("auto", "on", "off"):
        stop(f"{name}: expected auto, on or off, got {value!r}")
    return value


def stop(message: str) -> None:
    raise SystemExit(f"gradmem-kernels: {message}")


@functools.cache
def native_refusal() -> str:
    """Why nothing is compiled; empty if kernels are."""
    wanted = switch("GRADMEM_NATIVE")
    if wanted == "off":
        return "GRADMEM_NATIVE=off switched them off"
    reason = _machine_refusal()
    if reason and wanted == "on":
        stop(f"GRADMEM_NATIVE=on, but {reason}")
    return reason


def _machine_refusal() -> str:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"they are built on Linux for x86-64 and arm64, not on {platform.system()} for {platform.machine()}"
    named = shlex.split(os.environ.get("CXX", ""))
    if named and not shutil.which(named[0]):
        stop(f"CXX names a compiler that is not there: {named[0]}")
    if not named and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler was found (Debian, Ubuntu: apt install g++)"
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        return f"Python's headers were not found in {include} (Debian, Ubuntu: apt install python3-dev)"
    return ""


@functools.cache
def cuda() -> Cuda:
    """Whether kernels for CUDA are compiled, by which nvcc and for which architectures."""
    wanted = switch("GRADMEM_CUDA")
    reason, nvcc, toolkit, architectures = "", None, None, []
    if wanted == "off":
        reason = "GRADMEM_CUDA=off switched them off"
    elif native_refusal():
        reason = "nothing is compiled: " + native_refusal()
    else:
        nvcc = find_nvcc()
        if nvcc is None:
            reason = "no nvcc was found in PATH, or where CUDA_HOME or CUDACXX say"
        else:
            toolkit = _toolkit(nvcc)
            if int(toolkit.partition(".")[0]) < 12:
                reason = f"they need CUDA 12 or newer, and {nvcc} is of CUDA {toolkit}"
            architectures = _architectures(nvcc, toolkit)
    if reason and wanted == "on":
        stop(f"GRADMEM_CUDA=on, but {reason}")
    if not reason and not cuda_sources():
        reason = "this version has none"
    return Cuda(nvcc, toolkit, architectures, reason)


def find_nvcc() -> str | None:
    """What CUDACXX names, else that of CUDA_HOME or CUDA_PATH, else the first in PATH, else the usual place's."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _toolkit(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], text=True, capture_output=True, check=True).stdout
    found = re.search(r"\bV(\d+\.\d+(?:\.\d+)?)", output)
    if found is None:
        stop(f"{nvcc} --version does not say which CUDA it is of:\n{output}")
    return found[1]


def _architectures(nvcc: str, toolkit: str) -> list[str]:
    named = re.split(r"[;,\s]+", os.environ.get("GRADMEM_CUDA_ARCHS", "").strip(";, ") or "80;90a")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], text=True, capture_output=True, check=True).stdout
    known = re.findall(r"compute_(\d+)", listed)
    for name in named:
        if not re.fullmatch(r"\d+[af]?", name) or name.rstrip("af") not in known:
            stop(f"GRADMEM_CUDA_ARCHS: expected some of {', '.join(known)}, each perhaps with an a, of nvcc {toolkit}, "
                 f"got {name!r}")
    return named


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def needs_cutlass() -> bool:
    if cuda().reason or "90a" not in cuda().architectures:
        return False
    return any(re.search(r"#include\s*<(cute|cutlass)/", path.read_text())
               for path in (ROOT / "csrc" / "cuda").rglob("*") if path.is_file())


def cutlass_include() -> str:
    """Found without importing the package, which would import much else."""
    spec = importlib.util.find_spec("cutlass_library")
    for folder in spec.submodule_search_locations or () if spec else ():
        include = Path(folder) / "source" / "include"
        if (include / "cute" / "tensor.hpp").is_file():
            return str(include)
    stop(f"the CUDA kernels need CUTLASS's headers: pip install '{CUTLASS}', or build with GRADMEM_CUDA=off")
    raise AssertionError


def modules() -> list[str]:
    return [] if native_refusal() else ["_cpu"] if cuda().reason else ["_cpu", "_cuda"]


def store(folder: Path, compiled: dict[str, Any]) -> None:
    """Writes the decision into the package; modules go that an earlier build left there and this one does not have."""
    for stale in folder.glob("_*.so"):
        if stale.name.partition(".")[0] not in modules():
            stale.unlink()
    info = {"platform": sysconfig.get_platform(), "python": platform.python_version(), "modules": modules(),
            "native_refusal": native_refusal(), "cuda_refusal": cuda().reason, "cuda_toolkit": cuda().toolkit,
            "cuda_architectures": cuda().architectures, **compiled}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INFO).write_text(json.dumps(info, indent=1) + "\n")


class BuildPy(build_py):
    def run(self) -> None:
        # what an earlier build left in its folder would become part of this one's wheel
        for package in () if self.editable_mode else {name.partition(".")[0] for name in self.packages or ()}:
            shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()
        folder = self.get_package_dir(PACKAGE) if self.editable_mode else Path(self.build_lib, *PACKAGE.split("."))
        if native_refusal():
            self.warn(f"no compiled kernels: {native_refusal()}")
            store(Path(folder), {})


class BuildExt(build_ext):
    """Has CMake build all modules, in a folder that stays: what did not change is not compiled again."""

    def run(self) -> None:
        self.compiled: dict[str, Any] = {}
        super().run()
        store(Path(self.get_ext_fullpath(f"{PACKAGE}._cpu")).parent, self.compiled)

    def build_extension(self, ext: Extension) -> None:
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        if not self.compiled:
            self._cmake(folder)
            lines = (folder / "compiled.txt").read_text().splitlines()
            self.compiled = {name: value.strip() for name, _, value in (line.partition(": ") for line in lines)}
        target = Path(self.build_lib, *ext.name.split(".")[:-1])
        target.mkdir(parents=True, exist_ok=True)
        name = Path(self.get_ext_filename(ext.name)).name
        self.copy_file(str(folder / name), str(target / name))

    def _cmake(self, folder: Path) -> None:
        cmake, ninja, pybind11 = tools()
        settings_file = folder / "settings.json"
        before = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
        settings = {"source": str(ROOT), "nvcc": cuda().nvcc or before.get("nvcc"),
                    **{name: os.environ.get(name) for name in FRESH_FOR}}
        options = {"CMAKE_MAKE_PROGRAM": ninja, "pybind11_DIR": pybind11, "Python_EXECUTABLE": sys.executable,
                   "GRADMEM_CUDA": "OFF" if cuda().reason else "ON"}
        if not cuda().reason:
            options["CMAKE_CUDA_COMPILER"] = cuda().nvcc
            options["CMAKE_CUDA_ARCHITECTURES"] = ";".join(cuda().architectures)
        if needs_cutlass():
            options["CUTLASS_INCLUDE"] = cutlass_include()
        fresh = [] if before == settings else ["--fresh"]
        jobs = os.environ.get("MAX_JOBS") or str(self.parallel or "")
        if jobs and not re.fullmatch("[1-9][0-9]*", jobs):
            stop(f"MAX_JOBS: expected a number, got {jobs!r}")
        folder.mkdir(parents=True, exist_ok=True)
        settings_file.unlink(missing_ok=True)
        try:
            self.spawn([cmake, *fresh, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
                        *(f"-D{name}={value}" for name, value in options.items())])
            settings_file.write_text(json.dumps(settings))
            self.spawn([cmake, "--build", str(folder), *(["-j", jobs] if jobs else []), "--target", *modules()])
        except Exception as error:
            stop(f"the kernels do not compile ({error}); GRADMEM_NATIVE=off installs the package without them, "
                 "GRADMEM_CUDA=off without those for CUDA")


def _program(name: str, attribute: str) -> str | None:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return shutil.which(name)
    # of what pip installed with --target, ninja does not know where its program is
    folders = getattr(module, attribute), str(Path(str(module.__file__)).parents[1] / "bin")
    installed = (shutil.which(name, path=folder) for folder in folders if folder)
    return next(filter(None, installed), None) or shutil.which(name)


def tools() -> tuple[str, str, str]:
    """CMake and ninja, those that pip installed first, and the folder of pybind11's configuration for CMake."""
    found: list[str | None] = [_program("cmake", "CMAKE_BIN_DIR"), _program("ninja", "BIN_DIR")]
    try:
        found.append(importlib.import_module("pybind11").get_cmake_dir())
    except ImportError:
        found.append(None)
    missing = [name for name, path in zip(("cmake", "ninja", "pybind11"), found, strict=True) if path is None]
    if missing:
        stop(f"building without isolation needs what is missing here: pip install {' '.join(missing)}")
    return tuple(found)


setup(ext_modules=[Extension(f"{PACKAGE}.{name}", sources=[]) for name in modules()],
      cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
      setup_requires=[CUTLASS] if needs_cutlass() else [])
