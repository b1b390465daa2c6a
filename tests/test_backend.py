from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gradmem_kernels import backend as backends
from gradmem_kernels.backend import BACKENDS, OPS, BackendError, explain, select, use_backend
from gradmem_kernels.rms_norm import rms_norm

X = torch.ones(2, 3)


@pytest.fixture
def kernels(monkeypatch):
    """Stands in for every backend of rms_norm: ``native`` serves vectors only, ``triton`` nothing."""
    refusals = {"triton": lambda *tensors: "no CUDA device", "reference": lambda *tensors: None,
                "native": lambda *tensors: "only vectors" if any(t.ndim > 1 for t in tensors) else None}
    assert refusals.keys() == set(BACKENDS)
    modules = {name: SimpleNamespace(refusal=refusal) for name, refusal in refusals.items()}
    for name, module in modules.items():
        monkeypatch.setitem(backends._loaded, (name, "rms_norm"), module)
    monkeypatch.setattr(backends, "_requested", None)
    return modules


def test_the_first_backend_that_serves_is_chosen(kernels):
    assert select("rms_norm", None, X[0]) is kernels["native"]
    assert select("rms_norm", None, X) is kernels["reference"]


def test_a_request_goes_before_the_choice_and_a_call_before_both(kernels):
    with use_backend("reference"):
        assert select("rms_norm", None, X[0]) is kernels["reference"]
        assert select("rms_norm", "native", X[0]) is kernels["native"]
        with use_backend(None):
            assert select("rms_norm", None, X[0]) is kernels["native"]
        assert select("rms_norm", None, X[0]) is kernels["reference"]
    assert select("rms_norm", None, X[0]) is kernels["native"]


def test_a_request_ends_with_its_block_even_after_an_error(kernels):
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert select("rms_norm", None, X[0]) is kernels["native"]


@pytest.mark.parametrize(("name", "reason"), [("triton", "no CUDA device"), ("native", "only vectors")])
def test_a_named_backend_that_cannot_serve_raises_and_says_why(name, reason, kernels):
    message = rf"^rms_norm: backend: '{name}' cannot serve this call: {reason}; pass backend=None"
    with pytest.raises(BackendError, match=message):
        select("rms_norm", name, X)
    with pytest.raises(BackendError, match=message), use_backend(name):
        select("rms_norm", None, X)


def test_a_backend_without_kernels_of_the_op_says_so():
    with pytest.raises(BackendError, match="this version has no triton kernels for no_such_op"):
        select("no_such_op", "triton")


def test_a_platform_without_triton_says_so(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    with pytest.raises(BackendError, match="'triton' cannot serve this call: Triton is not installed"):
        select("attention", "triton")
    assert select("attention", None).__name__ != "gradmem_kernels.triton.attention"


@pytest.mark.parametrize("name", ["cuda", "Reference"])
def test_unknown_backends_raise(name):
    message = rf"^backend: expected one of triton, native, reference or None, got {name!r}$"
    with pytest.raises(BackendError, match=message):
        rms_norm(X, X[0], backend=name)
    with pytest.raises(BackendError, match=message), use_backend(name):
        pass


def test_the_choice_is_explained(kernels):
    row = next(row for row in explain(X) if row.op == "rms_norm")
    assert row == ("rms_norm", "reference", "triton: no CUDA device; native: only vectors")
    row = next(row for row in explain(X[0]) if row.op == "rms_norm")
    assert row == ("rms_norm", "native", "triton: no CUDA device")


def test_every_op_is_explained_and_served():
    rows = explain()
    assert tuple(row.op for row in rows) == OPS
    assert all(row.backend in BACKENDS and row.reason for row in rows)
    for op in OPS:
        reference = select(op, "reference")
        kernels = ("forward", "transpose") if op == "rotary" else ("forward", "backward", "dual_forward",
                                                                   "dual_backward")
        assert all(callable(getattr(reference, kernel)) for kernel in kernels)


def test_environment_variable():
    code = "import torch; from gradmem_kernels.rms_norm import rms_norm; rms_norm(torch.ones(2, 3), torch.ones(3))"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "GRADMEM_BACKEND": "cuda"}, text=True,
                         capture_output=True, check=False)
    assert "BackendError: backend: expected one of triton, native, reference or None, got 'cuda'" in run.stderr
