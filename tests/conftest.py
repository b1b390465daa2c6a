"""Fixtures of every test: the backends an op runs on, poisoned allocations, one thread, repeatable examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from torch.utils._device import _device_constructors

from gradmem_kernels import backend as backends

torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, max_examples=25, deadline=None, database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
hypothesis.settings.load_profile("repeatable")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a ``backend`` argument runs on every backend that serves its module's ``OP`` on this machine.

    A module may name the ``BACKENDS`` that it is about.
    """
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "OP"):
        names = getattr(metafunc.module, "BACKENDS", backends.BACKENDS)
        metafunc.parametrize("backend", [name for name in names if _serves(name, metafunc.module.OP)])


def _serves(name: str, op: str) -> bool:
    try:
        backends.select(op, name)
    except backends.BackendError:
        return False
    return True


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floating point memory holds NaN: a kernel that leaves an element unwritten is found out."""
    _device_constructors()  # what torch.device(...) acts on is found once: before these are replaced

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"),
                        (torch.Tensor, "new_empty_strided")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
