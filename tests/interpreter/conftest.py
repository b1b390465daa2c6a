"""Tests of Triton kernels in its interpreter, in a process of their own: kernels are bound to it when decorated."""

import functools
import os

import pytest
import second_order

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _faster_interpreter():
    """Calls of device functions patch the language anew, which the kernel's launch has done: a third of the time."""
    from triton.runtime import interpreter

    function, patched = interpreter.InterpretedFunction, pytest.MonkeyPatch()
    call = function.__call__

    def call_patched(self, *args, **kwargs):
        ours = self.fn.__module__.startswith("gradmem_kernels.")
        return self.rewrite()(*args, **kwargs) if ours else call(self, *args, **kwargs)

    patched.setattr(function, "__call__", call_patched)
    yield
    patched.undo()


@pytest.fixture(autouse=True)
def _faster_gradcheck(monkeypatch):
    """Jacobians along random directions: the interpreter takes a minute for whole ones, and values are compared too."""
    for name in ("gradcheck", "gradgradcheck"):
        monkeypatch.setattr(second_order, name, functools.partial(getattr(second_order, name), fast_mode=True))
