"""``make gpu``: its stages run what there is, one after the other, and go on where they stopped. No GPU takes part."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.__main__ import parser
from benchmarks.suites import SUITES

ROOT = Path(__file__).parent.parent
STAGES = re.search(r"^STAGES \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()

pytestmark = pytest.mark.skipif(shutil.which("make") is None or shutil.which("timeout") is None,
                                reason="needs make and timeout")


@pytest.fixture
def clone(tmp_path):
    """A Makefile beside an interpreter that writes down what it is called with, and fails where it is told to."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "stub").write_text('#!/bin/sh\necho "$@" >> calls\ncase "$*" in *"$FAIL"*) exit 1;; esac\n')
    (tmp_path / "stub").chmod(0o755)
    return tmp_path


def make(folder, *words, fail="no such words"):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", "WITH=./stub", *words], cwd=folder, env=environment | {"FAIL": fail},
                          capture_output=True, text=True, check=False)


def calls(folder):
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("dry", ["", "1"])
def test_every_stage_names_suites_and_parts_that_there_are(dry, clone):
    done = make(clone, "-n", f"GPU_DRY={dry}", *(f"build/gpu/{stage}" for stage in STAGES))
    assert done.returncode == 0, done.stderr
    found = [shlex.split(line)[4:] for line in done.stdout.splitlines() if "./stub -m benchmarks" in line]
    stages = [stage for stage in STAGES if stage not in ("build", "configs", "sanitize", "tests", "ops")]
    assert len(found) == 1 + len(stages) + len(SUITES["ops"].PARTS)
    assert [words[2] for words in found if words[0] == "ops"] == list(SUITES["ops"].PARTS)
    for words in found:
        args = parser().parse_args(words)
        assert (args.store, args.device, args.quick) == ((False, "cpu", True) if dry else (True, "cuda", False))
        assert args.device in SUITES[args.suite].DEVICES
        assert set(args.only) <= set(getattr(SUITES[args.suite], "PARTS", ()))
    named = set(re.findall(r"\btests/gpu\S*", done.stdout))
    assert named
    assert all((ROOT / path).exists() for path in named)
    assert ("compute-sanitizer --tool memcheck" in done.stdout) == (not dry)


def test_stages_are_done_once(clone):
    done = make(clone, "gpu", "GPU_DRY=1", "STAGES=headline flat inner")
    assert done.returncode == 0, done.stderr
    assert [line.partition(" --quick")[0] for line in calls(clone)] == [
        "-m benchmarks attention --only headline", "-m benchmarks attention --only long",
        "-m benchmarks meta-step --only flat", "-m benchmarks inner-step"]
    again = make(clone, "gpu", "GPU_DRY=1", "STAGES=headline flat inner")
    assert again.stdout.count("is done") == 3
    assert len(calls(clone)) == 4
    make(clone, "gpu-again", "STAGES=flat")
    make(clone, "gpu", "GPU_DRY=1", "STAGES=headline flat inner")
    assert calls(clone)[4:] == ["-m benchmarks meta-step --only flat --quick --device cpu"]


def test_a_stage_that_fails_does_not_stop_the_others(clone):
    done = make(clone, "gpu", "GPU_DRY=1", "STAGES=flat inner", fail="meta-step")
    assert done.returncode != 0
    assert "not done: flat" in done.stdout
    assert len(calls(clone)) == 2
    assert make(clone, "gpu", "GPU_DRY=1", "STAGES=flat inner").returncode == 0


def test_nothing_is_started_after_the_time(clone):
    done = make(clone, "gpu", "GPU_DRY=1", "GPU_MINUTES=0", "STAGES=flat")
    assert done.returncode != 0
    assert "not done: flat" in done.stdout
    assert not (clone / "calls").exists()


def test_a_pack_is_unpacked_beside_the_interpreter(clone):
    (clone / "build" / "gpu-pack").mkdir(parents=True)
    assert make(clone, "gpu", "GPU_DRY=1", "STAGES=flat").returncode == 0
    first, second, _ = calls(clone)
    for line in (first, second):
        assert line.startswith("-m pip install -q --no-index --find-links build/gpu-pack --target build/gpu/site ")
    assert second.endswith("--no-deps nvidia-cutlass")


def test_an_op_that_is_done_is_not_done_again(clone):
    words = ["gpu", "GPU_DRY=1", "STAGES=ops"]
    assert make(clone, *words, fail="swiglu").returncode != 0
    assert make(clone, *words).returncode == 0
    ops = [re.search(r"--only (\S+)", line)[1] for line in calls(clone)]
    parts = list(SUITES["ops"].PARTS)
    assert ops == [*parts[: parts.index("swiglu") + 1], *parts[parts.index("swiglu"):]]
    make(clone, "gpu-again", "STAGES=ops")
    assert make(clone, *words).returncode == 0
    assert len(calls(clone)) == len(ops) + len(parts)


def test_what_was_begun_and_not_finished_comes_last(clone):
    """A stage that always fails, or takes longer than there is, would have the others wait for ever."""
    words = ["gpu", "GPU_DRY=1", "STAGES=flat inner train", "GPU_MINUTES=1"]
    assert make(clone, *words, fail="meta-step").returncode != 0
    (clone / "build" / "gpu" / "inner").unlink()
    make(clone, *words, fail="inner-step")
    order = [re.search(r"benchmarks (\S+)", line)[1] for line in calls(clone)]
    assert order == ["meta-step", "inner-step", "end-to-end", "meta-step", "inner-step"]
    (clone / "build" / "gpu" / "train.begun").unlink()
    (clone / "build" / "gpu" / "train").unlink()
    make(clone, *words, fail="inner-step")
    assert [re.search(r"benchmarks (\S+)", line)[1] for line in calls(clone)[5:]] == ["end-to-end", "inner-step"]


def test_a_build_that_was_stopped_still_comes_first(clone):
    words = ["gpu", "GPU_DRY=1", "STAGES=build flat"]
    make(clone, *words, fail="build_ext")
    (clone / "build" / "gpu" / "flat").unlink()
    make(clone, *words)
    assert [line.split()[0:3] for line in calls(clone)[-3:]] == [
        ["setup.py", "build_ext", "--inplace"], ["-m", "gradmem", "doctor"], ["-m", "benchmarks", "meta-step"]]


def test_a_pack_may_come_later(clone):
    assert make(clone, "gpu", "GPU_DRY=1", "STAGES=flat").returncode == 0
    (clone / "build" / "gpu-pack").mkdir(parents=True)
    assert make(clone, "gpu", "GPU_DRY=1", "STAGES=flat inner").returncode == 0
    assert [line.split()[1] for line in calls(clone)] == ["benchmarks", "pip", "pip", "benchmarks"]
