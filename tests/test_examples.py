"""The examples on attention alone run, and what they train gets better."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_maml_attention() -> None:
    losses = example("maml_attention").train(80)
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_gradient_penalty() -> None:
    log = example("gradient_penalty").train(60)
    assert log[-1][1] < 0.2 * log[0][1]
    assert log[-1][0] > 0.3 > log[0][0]
