"""Attention's kernels for Hopper without a GPU: their sources, compiled for a CPU (csrc/tests/cuda_on_cpu/hopper.h).

Arithmetic, CuTe's layouts, what is seen and who computes what are those of the kernels. TMA's and WGMMA's descriptors,
asynchrony and CUDA itself are not tested here (tests/gpu/test_attention_hopper_gpu.py).
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from attention_hopper_checks import CALLS, EMPTY, SOME, check_call, check_empty, check_some

from gradmem_kernels import attention
from gradmem_kernels.backend import BackendError
from gradmem_kernels.native import attention as native
from gradmem_kernels.native import common

FOLDER = Path(__file__).parent.parent / "build" / (
    f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}") / "hopper_on_cpu"
BUILT = FOLDER / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
pytestmark = [pytest.mark.skipif(not BUILT.is_file(), reason=f"{BUILT} is not there: make test-hopper builds it"),
              pytest.mark.usefixtures("poisoned_memory")]


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("hopper_on_cpu._cuda", BUILT)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(autouse=True)
def _on_cpu(module, monkeypatch):
    """Has these kernels serve tensors on a CPU."""
    monkeypatch.setattr(common, "multiprocessors", lambda t: 2)
    monkeypatch.setattr(common, "stream", lambda t: 0)
    monkeypatch.setattr(native, "capability", lambda t: (9, 0))
    for owner in (common, native):
        monkeypatch.setattr(owner, "is_cuda", lambda t: True)
        monkeypatch.setattr(owner, "cuda", lambda: module)


@pytest.mark.parametrize("name", CALLS)
def test_every_kernel(name):
    check_call(name, "cpu")


@pytest.mark.parametrize("name", SOME)
def test_some_tangents_and_cotangents(name):
    check_some(name, "cpu")


@pytest.mark.parametrize("name", EMPTY)
def test_empty(name):
    check_empty(name, "cpu")


def test_tensors_that_tma_cannot_read_are_copied():
    q = torch.randn(1, 2, 40, 64).bfloat16()
    expected = attention(q, q, q, causal=True, backend="native", first_order="own")
    moved = torch.empty(1, 2, 40, 68, dtype=torch.bfloat16)[..., 1:65].copy_(q)
    broadcast = q[:, :1].expand(1, 2, 40, 64)
    assert torch.equal(attention(moved, moved, moved, causal=True, backend="native", first_order="own"), expected)
    assert torch.equal(attention(q, broadcast, broadcast, backend="native", first_order="own"),
                       attention(q, q[:, :1], q[:, :1], backend="native", first_order="own"))


@pytest.mark.parametrize(("options", "reason"), [
    ({"window": 2}, "no window"), ({"softcap": 1.0, "dropout": 0.5}, "no softcap and dropout"),
    ({"grad_rows": (0, 2)}, "no grad_rows"), ({"mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, "no packing, mask")])
def test_what_they_do_not_serve_is_refused(options, reason):
    q = torch.randn(1, 1, 4, 64).bfloat16()
    with pytest.raises(BackendError, match=f"'native' cannot serve this call: its CUDA kernels have {reason}"):
        attention(q, q, q, backend="native", first_order="own", **options)


def test_more_samples_than_a_launch_has_are_refused():
    q = torch.zeros(2**16, 1, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="take at most 65535 samples and heads, not 65536 and 1"):
        attention(q, q, q, backend="native", first_order="own")


@pytest.mark.parametrize("q", [torch.zeros(1, 1, 2, 32).bfloat16(), torch.zeros(1, 1, 2, 64)], ids=["d", "dtype"])
def test_other_tensors_are_refused(q):
    with pytest.raises(BackendError, match="take bfloat16 and head dimensions of 64 and 128, not"):
        attention(q, q, q, backend="native", first_order="own")
