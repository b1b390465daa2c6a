"""What is read of CUDA C++ kernels off their module: numbers, names, and where nothing reads them."""

import shutil
from pathlib import Path

import pytest

from gradmem_kernels.native import kernel_attributes as attributes
from gradmem_kernels.native.kernel_attributes import KernelAttributes

USAGE = """
Fatbin ptx code:
================
arch = sm_80

Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fv:
  REG:29 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z1gv:
  REG:255 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fv:
  REG:31 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_parse():
    assert attributes.parse(USAGE) == {
        "_Z1fv sm_80": KernelAttributes(29, 0, 0), "_Z1gv sm_80": KernelAttributes(255, 16, 1024),
        "_Z1fv sm_90a": KernelAttributes(31, 0, 0)}
    with pytest.raises(ValueError, match="expected kernels, got 'nothing'"):
        attributes.parse("nothing")


@pytest.mark.parametrize(("name", "expected"), [
    ("void gradmem::(anonymous namespace)::f<(gradmem::Form)0, true, gradmem::(anonymous namespace)::BFloat16, 8>("
     "gradmem::ActivationForward, long) sm_80", "f<Form 0, true, BFloat16, 8> sm_80"),
    ("void gradmem::(anonymous namespace)::g<float, false, gradmem::(anonymous namespace)::Layout<4, 2, 32> >("
     "gradmem::NormForward) sm_90a", "g<float, false, Layout<4, 2, 32> > sm_90a")])
def test_readable_names(name, expected):
    assert attributes.readable(name) == expected


def test_without_cuobjdump(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(FileNotFoundError, match="cuobjdump: neither in PATH nor CUDA's toolkit, nor is Triton"):
        attributes.kernel_attributes(Path("_cuda.so"))
