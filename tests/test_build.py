"""What setup.py decides, what the compiled objects hold, and what an installation without them says."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from gradmem_kernels.native import build_info, driver

pytest.importorskip("setuptools", reason="the build needs setuptools")
ROOT = Path(__file__).resolve().parents[1]
SWITCHES = ("GRADMEM_NATIVE", "GRADMEM_CUDA", "GRADMEM_CUDA_ARCHS", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH")
OBJECTS = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}" / "CMakeFiles"


@pytest.fixture
def decide(monkeypatch, tmp_path):
    """Runs setup.py with such an environment, on a machine of Linux with a compiler and without nvcc."""
    tools = tmp_path / "tools"
    tools.mkdir()
    _script(tools / "c++", "")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()

    def run(**environment):
        for name in SWITCHES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(tools))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr("sys.platform", "linux")
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "include"))
        monkeypatch.setattr("setuptools.setup", lambda **_: None)
        source = tmp_path / "setup.py"
        shutil.copy(ROOT / "setup.py", source)
        return runpy.run_path(str(source))

    return run


def _script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def _nvcc(folder, version="13.0.88", architectures=(80, 90, 100)):
    _script(folder / "bin" / "nvcc", f"case $1 in --version) echo 'Cuda compilation tools, V{version}';; *) echo '"
            + " ".join(f"compute_{a}" for a in architectures) + "';; esac")
    return folder


def _kernel(tmp_path, include="cuda_runtime.h"):
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "op.cu").write_text(f"#include <{include}>\n")


def test_kernels_are_compiled_where_there_is_a_compiler(decide):
    assert decide()["modules"]() == ["_cpu"]


def test_the_switch_makes_a_pure_package(decide):
    found = decide(GRADMEM_NATIVE="off")
    assert found["modules"]() == []
    assert found["native_refusal"]() == "GRADMEM_NATIVE=off switched them off"
    assert found["cuda"]().reason.startswith("nothing is compiled: GRADMEM_NATIVE=off")


def test_no_compiler(decide, tmp_path):
    (tmp_path / "tools" / "c++").unlink()
    found = decide()
    assert found["modules"]() == []
    assert found["native_refusal"]().startswith("no C++ compiler was found")
    with pytest.raises(SystemExit, match=r"GRADMEM_NATIVE=on, but no C\+\+ compiler"):
        decide(GRADMEM_NATIVE="on")
    with pytest.raises(SystemExit, match="GRADMEM_CUDA=on, but nothing is compiled"):
        decide(GRADMEM_CUDA="on")


def test_missing_headers_of_python_count_as_no_compiler(decide, tmp_path):
    (tmp_path / "include" / "Python.h").unlink()
    assert decide()["native_refusal"]().startswith("Python's headers were not found in")


@pytest.mark.parametrize(("attribute", "value"), [("sys.platform", "darwin"), ("platform.machine", lambda: "riscv64")])
def test_other_platforms_get_a_pure_package(decide, monkeypatch, attribute, value):
    found = decide(GRADMEM_NATIVE="off")
    monkeypatch.setenv("GRADMEM_NATIVE", "auto")
    monkeypatch.setattr(attribute, value)
    found["native_refusal"].cache_clear()
    assert "they are built on Linux for x86-64 and arm64, not on" in found["native_refusal"]()


@pytest.mark.parametrize(("environment", "message"), [
    ({"GRADMEM_NATIVE": "yes"}, "GRADMEM_NATIVE: expected auto, on or off, got 'yes'"),
    ({"GRADMEM_CUDA": "1"}, "GRADMEM_CUDA: expected auto, on or off, got '1'"),
    ({"CXX": "no-such-compiler -O1"}, "CXX names a compiler that is not there: no-such-compiler"),
    ({"GRADMEM_CUDA": "on"}, "GRADMEM_CUDA=on, but no nvcc was found")])
def test_a_build_stops(decide, environment, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        decide(**environment)


def test_cuda_is_decided_by_the_toolkit(decide, tmp_path):
    assert decide()["cuda"]().reason.startswith("no nvcc was found")
    home = _nvcc(tmp_path / "cuda")
    found = decide(CUDA_HOME=home)["cuda"]()
    assert (found.toolkit, found.architectures) == ("13.0.88", ["80", "90a"])
    assert found.reason == "this version has none"
    _kernel(tmp_path)
    found = decide(CUDA_HOME=home)
    assert found["modules"]() == ["_cpu", "_cuda"]
    assert not found["needs_cutlass"]()
    assert decide(CUDA_HOME=home, GRADMEM_CUDA="off")["modules"]() == ["_cpu"]
    assert decide(CUDACXX=home / "bin" / "nvcc")["modules"]() == ["_cpu", "_cuda"]
    assert decide(CUDA_HOME=home, GRADMEM_CUDA_ARCHS="90a, 100")["cuda"]().architectures == ["90a", "100"]
    with pytest.raises(SystemExit, match=r"^[^:]*: GRADMEM_CUDA_ARCHS: expected some of 80, 90, 100,.* got '75'"):
        decide(CUDA_HOME=home, GRADMEM_CUDA_ARCHS="75")


def test_an_old_toolkit(decide, tmp_path):
    home = _nvcc(tmp_path / "cuda", version="11.8.89", architectures=(80, 90))
    assert "they need CUDA 12 or newer" in decide(CUDA_HOME=home)["cuda"]().reason
    with pytest.raises(SystemExit, match="GRADMEM_CUDA=on, but they need CUDA 12"):
        decide(CUDA_HOME=home, GRADMEM_CUDA="on")


def test_headers_of_cutlass_are_found_without_importing_the_package(decide, tmp_path, monkeypatch):
    _kernel(tmp_path, include="cute/tensor.hpp")
    home = _nvcc(tmp_path / "cuda")
    found = decide(CUDA_HOME=home)
    assert found["needs_cutlass"]()
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="pip install 'nvidia-cutlass"):
            found["cutlass_include"]()
    header = tmp_path / "cutlass_library" / "source" / "include" / "cute" / "tensor.hpp"
    header.parent.mkdir(parents=True)
    header.touch()
    (tmp_path / "cutlass_library" / "__init__.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert found["cutlass_include"]() == str(header.parents[1])


def test_programs_of_what_pip_installed_with_a_target(decide, tmp_path, monkeypatch):
    """Such a ninja does not know where its program is; on a machine without another one, it is found nevertheless."""
    site = tmp_path / "site"
    for name, attribute in (("cmake", f"CMAKE_BIN_DIR = {str(site / 'cmake' / 'data')!r}"), ("ninja", "BIN_DIR = ''"),
                            ("pybind11", "get_cmake_dir = lambda: 'there'")):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(attribute + "\n")
    for path in ("cmake/data/cmake", "bin/cmake", "bin/ninja"):
        _script(site / path, "")
    monkeypatch.syspath_prepend(str(site))
    for name in ("cmake", "ninja", "pybind11"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = decide()["tools"]
    assert found() == (str(site / "cmake" / "data" / "cmake"), str(site / "bin" / "ninja"), "there")
    (site / "bin" / "ninja").unlink()
    with pytest.raises(SystemExit, match="pip install ninja"):
        found()


def test_a_pure_wheel_keeps_nothing_of_an_earlier_build(tmp_path):
    for name in ("gradmem_kernels", "python", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    stale = tmp_path / "build" / "lib" / "gradmem_kernels" / "native" / "_cuda.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "GRADMEM_NATIVE": "off"},
                         text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "no compiled kernels: GRADMEM_NATIVE=off" in run.stdout + run.stderr
    wheel, = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = json.loads(archive.read("gradmem_kernels/native/build_info.json"))
    assert not [name for name in names if name.endswith(".so")]
    assert info["native_refusal"] == "GRADMEM_NATIVE=off switched them off"


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A package without compiled modules in ``tmp_path``, of which nothing is known."""
    build_info.build_info.cache_clear()
    monkeypatch.setattr(build_info, "find_spec", lambda name: None)
    monkeypatch.setattr(build_info, "_HERE", tmp_path / "gradmem_kernels" / "native")
    monkeypatch.setattr(build_info, "_ROOT", tmp_path)
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [])
    (tmp_path / "gradmem_kernels" / "native").mkdir(parents=True)
    yield tmp_path
    build_info.build_info.cache_clear()


def test_a_source_tree_without_binaries_says_so(elsewhere):
    (elsewhere / "CMakeLists.txt").touch()
    assert build_info.missing.__wrapped__("_cpu") == (
        f"this installation has no compiled kernels for CPUs: nothing was built in the source tree {elsewhere}, from "
        f"which it is imported; pip install -e {elsewhere}")


def test_a_source_tree_that_hides_an_installation_warns(elsewhere, tmp_path_factory, monkeypatch):
    (elsewhere / "CMakeLists.txt").touch()
    site = tmp_path_factory.mktemp("site")
    found = importlib.metadata.PathDistribution(site / "gradmem_kernels-0.1.0.dist-info")
    (site / "gradmem_kernels" / "native").mkdir(parents=True)
    (site / "gradmem_kernels" / "native" / "_cpu.cpython-311.so").touch()
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [found])
    with pytest.warns(RuntimeWarning, match="hides the installed package"):
        message = build_info.missing.__wrapped__("_cpu")
    assert message.endswith(f"hides the installed package in {site / 'gradmem_kernels'}; start Python elsewhere")


@pytest.mark.parametrize(("module", "info", "message"), [
    ("_cpu", {"native_refusal": "no C++ compiler was found"}, "CPUs: when it was built, no C++ compiler was found"),
    ("_cuda", {"native_refusal": "", "cuda_refusal": "no nvcc was found"}, "CUDA: when it was built, no nvcc was"),
    ("_cuda", {"native_refusal": "", "cuda_refusal": "this version has none"}, "CUDA: this version has none"),
    ("_cpu", {"native_refusal": "", "python": "3.9.1", "platform": "linux-x86_64"},
     "CPUs: it was built for Python 3.9.1 on linux-x86_64, and this is Python")])
def test_what_the_build_decided_is_said(elsewhere, module, info, message):
    (elsewhere / "gradmem_kernels" / "native" / "build_info.json").write_text(json.dumps(info))
    assert message in build_info.missing.__wrapped__(module)


def test_a_module_that_cannot_be_loaded_says_why(monkeypatch):
    monkeypatch.setattr(build_info, "find_spec", lambda name: object())
    assert "loading them fails: No module named 'gradmem_kernels.native._none'" in (
        build_info.missing.__wrapped__("_none"))


@pytest.mark.parametrize(("found", "toolkit", "old"), [
    (None, "13.0", False), ((13, 0), "13.0.88", False), ((12, 0), "12.9", False), ((12, 4), "13.0", True)])
def test_a_driver_that_is_too_old_is_named(monkeypatch, found, toolkit, old):
    monkeypatch.setattr(driver, "driver", lambda: found)
    reason = driver.too_old(toolkit)
    assert (reason is not None) == old
    if old:
        assert "the driver knows CUDA 12.4 and is too old for kernels that CUDA 13.0 compiled" in reason


def _objects(isa, tool):
    found = sorted((OBJECTS / f"cpu_{isa}.dir").rglob("*.o"))
    if not found:
        pytest.skip(f"{OBJECTS.parent.name} holds no objects of {isa}")
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return found


def _output(*command):
    return subprocess.run([str(word) for word in command], text=True, capture_output=True, check=True).stdout


@pytest.mark.skipif("x86" not in sysconfig.get_platform(), reason="of x86-64")
def test_baseline_objects_hold_no_avx():
    for path in _objects("baseline", "objdump"):
        listing = _output("objdump", "-d", "--no-show-raw-insn", path)
        assert "xmm" in listing
        assert not re.findall(r"^.*(?:%[yz]mm|\tv[a-z0-9]+ ).*$", listing, flags=re.MULTILINE)[:5], path


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets_share_nothing(isa):
    """A function that two of them define would be linked from one, which the other's machine may not run."""
    for path in _objects(isa, "nm"):
        names = [line.split(maxsplit=2)[2] for line in _output("nm", "-gC", "--defined-only", path).splitlines()]
        assert names
        # but for the address of the language's own handler of exceptions
        assert [name for name in names if not name.startswith((f"gradmem::{isa}::", "DW.ref.__gxx"))] == []
