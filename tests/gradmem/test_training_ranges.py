"""The named ranges of training, WRITE and READ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from gradmem import Experiment, GradMem, Trainer
from gradmem_kernels import profile_ranges


def names(run: Callable[[], object]) -> dict[str, str | None]:
    """Each of our ranges that the profiler saw, and the one around it."""
    with profile_ranges(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        run()
    found = {}
    for event in profiler.events():
        if event.name.startswith("gradmem::"):
            parent = event.cpu_parent
            while parent is not None and not parent.name.startswith("gradmem::"):
                parent = parent.cpu_parent
            found[event.name[9:]] = None if parent is None else parent.name[9:]
    return found


def test_a_training_run(experiment: Experiment, tmp_path: Path) -> None:
    found = names(Trainer(experiment, tmp_path).run)
    assert {f"train step {step}" for step in range(6)} <= found.keys()
    assert found["train step 0"] is None
    for name in ("data", "write prepare", "write", "read", "outer backward", "optimizer step"):
        assert found[name] in {f"train step {step}" for step in range(6)} | {"evaluate"}, name
    assert found["write step 0"] == "write"
    assert found["outer backward step 0"] == "outer backward"
    assert found["evaluate"] is None


def test_write_read_and_generate(make_model: Callable[..., GradMem]) -> None:
    model, ids = make_model(), torch.tensor([[1, 2, 3]])
    memory = model.write(ids)
    found = names(lambda: (model.write(ids), model.read(memory, ids), model.generate(memory, ids, max_new_tokens=1)))
    assert {name: found[name] for name in ("write", "write step 1", "read", "read generate")} == {
        "write": None, "write step 1": "write", "read": None, "read generate": None}
    assert found["attention"] == "read generate"
