"""What the compile report builds of norms, activations and rotary, and what its command keeps of other ops."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import compile_report as report
from benchmarks import compile_rows as rows
from gradmem_kernels.triton.common import INTERPRETED

BUILDS = {build.name: build for build in rows.rows_builds()}
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")


def test_every_op_is_built_for_each_class_and_architecture():
    assert {build.op for build in BUILDS.values()} == set(rows.CALLS)
    assert len(BUILDS) == sum(4 * len(call.modes) * len(call.widths) for call in rows.CALLS.values())
    assert {(build.dtype, build.architecture) for build in BUILDS.values()} == {
        (dtype, architecture) for dtype in ("half", "float32") for architecture in ("sm_80", "sm_90")}


def test_configurations_are_those_of_the_launch():
    assert BUILDS["rms_norm forward half D4096 sm_90"].config[:3] == (1, 4096, 16)
    assert BUILDS["rms_norm forward half D128 sm_90"].config[:3] == (16, 128, 8)
    assert BUILDS["layer_norm dual_backward half D16384 sm_90"].config[:3] == (1, 4096, 16)
    assert BUILDS["swiglu backward half D4096 sm_90"].config[:3] == (1, 1024, 4)
    assert BUILDS["rotary forward half D128 sm_90"].config[:3] == (16, 64, 4)


@needs_compiler
@pytest.mark.parametrize(("name", "present"), [
    ("layer_norm forward", {"p_x", "p_w", "p_c", "p_y", "p_rstd", "p_mean"}),
    ("rms_norm forward", {"p_x", "p_w", "p_y", "p_rstd"}),
    ("rms_norm dual_forward", {"p_x", "p_xt", "p_w", "p_y", "p_yt", "p_rstd"}),
    ("rms_norm backward", {"p_x", "p_b", "p_w", "p_rstd", "p_dxt", "p_dwt"}),
    ("rms_norm backward frozen", {"p_x", "p_b", "p_w", "p_rstd", "p_dxt"}),
    ("rms_norm dual_backward frozen", {"p_x", "p_xt", "p_a", "p_b", "p_w", "p_rstd", "p_dx", "p_dxt"}),
    ("rms_norm forward add", {"p_x", "p_r", "p_w", "p_y", "p_s", "p_rstd"}),
    ("rms_norm dual_forward add", {"p_x", "p_xt", "p_r", "p_rt", "p_w", "p_y", "p_yt", "p_s", "p_st", "p_rstd"}),
    ("rms_norm backward frozen add", {"p_x", "p_b", "p_h", "p_w", "p_rstd", "p_dxt"}),
    ("rms_norm dual_backward frozen add",
     {"p_x", "p_xt", "p_a", "p_b", "p_g", "p_h", "p_w", "p_rstd", "p_dx", "p_dxt"}),
    ("rms_norm double_backward", {"p_x", "p_xt", "p_b", "p_w", "p_wt", "p_rstd", "p_dx", "p_yt", "p_dw"}),
    ("swiglu dual_backward", {"p_x", "p_up", "p_xt", "p_upt", "p_a", "p_b", "p_dx", "p_dxt", "p_dup", "p_dupt"}),
    ("gelu double_backward", {"p_x", "p_xt", "p_b", "p_dx", "p_yt"})])
def test_a_build_has_the_pointers_of_its_call(name, present):
    """What a call has no use for is neither read nor written."""
    width = 1024 if name.startswith("layer_norm") else 4096
    source = BUILDS[f"{name} half D{width} sm_90"].source()
    assert {name for name, kind in source.signature.items() if str(kind).startswith("*")} == present


@needs_compiler
@pytest.mark.parametrize(("name", "loads", "stores"), [
    ("rms_norm dual_forward half D4096 sm_90", 3, 3),  # x, x_t, w; y, y_t, rstd
    ("rms_norm dual_backward frozen half D4096 sm_90", 6, 2),  # x, x_t, a, b, w, rstd; dx, dx_t
    # two accesses each: x, x_t, r, r_t, w; y, y_t, s, s_t; and rstd
    ("rms_norm dual_forward add half D4096 sm_90", 10, 9),
    ("rms_norm dual_backward frozen add half D4096 sm_90", 15, 4),
    ("swiglu dual_backward half D4096 sm_90", 6, 4)])
def test_every_element_is_read_and_written_once(name, loads, stores, tmp_path, monkeypatch):
    """A thread has one access of 16 bytes to every 8 elements, although the norms' text goes over a row more than once.

    It has 8 of each tensor, or 16.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = report._compile(BUILDS[name]).asm["ptx"]
    assert (ptx.count("ld.global"), ptx.count("st.global")) == (loads, stores)


def test_a_stack_is_refused():
    name, build = next(iter(BUILDS.items()))
    line = report.read_table("3.6.0")[name]
    assert list(report.compare([build], {name: line}, {name: line})) == []
    spilled = replace(line, stack=8)
    found, = report.compare([build], {name: spilled}, {name: spilled})
    assert "stack: expected at most 0 bytes" in found


def test_an_update_of_one_op_keeps_the_lines_of_others(tmp_path, monkeypatch):
    version = report.triton.__version__
    before = report.path(version).read_text().splitlines()
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.path(version).write_text("\n".join(before) + "\n")
    monkeypatch.setattr(report, "INTERPRETED", False)
    compiled = []

    def compile_all(builds, jobs, console):
        compiled.extend(build.name for build in builds)
        lines = report.read_table(version)
        return {build.name: replace(lines[build.name], registers=1) for build in builds}, []

    monkeypatch.setattr(report, "_compile_all", compile_all)
    assert report.main(["--only", "gelu", "--update"]) == 0
    after = report.path(version).read_text().splitlines()
    assert compiled == [name for name in BUILDS if name.startswith("gelu ")]
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [line for line in after if line.startswith('"gelu ')]
    assert all(json.loads(f"{{{line.rstrip(',')}}}").popitem()[1]["registers"] == 1 for line in changed)
