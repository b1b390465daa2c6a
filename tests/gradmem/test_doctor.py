"""What ``gradmem doctor`` tells of this installation."""

from __future__ import annotations

import importlib
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmem import doctor
from gradmem.cli import app
from gradmem_kernels.native.kernel_attributes import KernelAttributes


def test_doctor() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for word in ("torch", "safetensors", "triton", "attention", "linear_cross_entropy", "backends on cpu",
                 "compiled kernels", "for CPUs", "for CUDA", "CUDA toolkit of the build", "driver"):
        assert word in result.output


@pytest.mark.parametrize("name", ["native", "reference", "triton"])
def test_doctor_names_the_first_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of attention: the kernels' own where they are faster than PyTorch's."""
    monkeypatch.setattr("gradmem_kernels.backend.select", lambda *args: importlib.import_module(
        f"gradmem_kernels.{name}.attention"))
    output = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"]).output
    expected = "its own kernels" if name == "native" else "cpu_flash where it serves"
    assert f"attention's first order on cpu: {expected}\n" in output


def test_doctor_tells_of_cuda_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"a sm_80": KernelAttributes(32, 0, 0), "b<1> sm_80": KernelAttributes(96, 8, 512),
               "a sm_90a": KernelAttributes(40, 0, 0)}
    assert doctor._attributes() == {} or find_spec("gradmem_kernels.native._cuda")
    monkeypatch.setattr(doctor, "find_spec", lambda name: ModuleSpec(name, None, origin=str(tmp_path / "_cuda.so")))
    monkeypatch.setattr(doctor, "kernel_attributes", lambda *modules: kernels)
    assert doctor._attributes() == {
        "sm_80": "2, each 32 to 96 registers and at most 8 bytes of stack per thread",
        "sm_90a": "1, each 40 to 40 registers and at most 0 bytes of stack per thread"}
