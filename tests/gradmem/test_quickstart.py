"""The blocks of docs/quickstart.md run, one after the other, as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "accelerate"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    page = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/quickstart.md", "exec"), names)
    assert names["answers"].shape == (4, 4)
    assert names["rows"].shape == (4, 5, 16)
    assert names["target"].grad.abs().max() > 0
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "gradmem" / "model.safetensors").exists()
