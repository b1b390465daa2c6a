"""The example of docs/profiling.md: it runs, and its timeline has the ranges that the page reads."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ["--device", "cpu", "--batch", "2", "--context", "9", "--width", "16", "--layers", "1", "--steps", "3"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("profile_inner_steps", ROOT / "examples" / "profile_inner_steps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_timeline_of_inner_steps(example, tmp_path, capsys):
    trace = tmp_path / "new" / "trace.json"
    example.main([*SMALL, "--trace", str(trace)])
    names = Counter(event["name"].removeprefix("gradmem::") for event in json.loads(trace.read_text())["traceEvents"]
                    if event.get("cat") == "user_annotation")
    assert {name: names[f"write step {k}"] for k, name in enumerate("abc")} == {"a": 1, "b": 1, "c": 1}
    assert all(names[f"outer backward step {k}"] == 1 for k in range(3))
    assert names["write"] == names["read"] == 1
    # a layer, K steps; READ's is one more
    assert names["attention dual_forward"] == names["attention dual_backward"] == 3
    printed = capsys.readouterr().out
    assert "outer backward step 2" in printed
    assert "triton_" not in printed
    assert "native_" not in printed


@pytest.mark.parametrize("tool", ["cuda", "proton"])
def test_tools_of_a_gpu_say_what_they_need(tool, example, tmp_path):
    with pytest.raises(SystemExit, match=f"--tool {tool}: expected a CUDA device"):
        example.main([*SMALL, "--tool", tool, "--trace", str(tmp_path / "x")])


def test_the_page_names_ranges_that_there_are(example, tmp_path):
    """Filters of Nsight match whole names, so a name that is not there profiles nothing."""
    text = (ROOT / "docs" / "profiling.md").read_text()
    named = set(re.findall(r"gradmem::([a-z_ ]+(?: \d+)?)(?=[@/'\"])", text))
    trace = tmp_path / "trace.json"
    example.main([*SMALL, "--trace", str(trace)])
    there = {event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "name" in event}
    assert named
    assert {f"gradmem::{name}" for name in named} <= there
