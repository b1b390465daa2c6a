"""What the compile report reads, refuses and covers; the report itself: `make compile-report`."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import __main__ as command
from benchmarks import compile_report as report
from gradmem_kernels.triton import attention
from gradmem_kernels.triton.attention_configs import CONFIGS, KERNELS, Config, Key, override
from gradmem_kernels.triton.common import INTERPRETED

CONSTRAINTS = (Path(__file__).parent.parent / "constraints.txt").read_text()
#: The oldest version that pyproject.toml allows, and the one of the environment.
VERSIONS = ("3.6.0", *re.findall(r"^triton==(\S+)", CONSTRAINTS, re.MULTILINE))
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

CONFIG = Config(64, 32, 4, 2)
BUILD = report.Build("forward half d64 sm_90", "forward", "bf16", 64, "sm_90", CONFIG)
LINE = report.Line(64, 32, 4, 2, False, None, registers=128, stack=0, spills=0, shared=1024, wgmma=8, mma=0)

USAGE = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function forward_kernel:
  REG:133 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:720 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
TEXT = """
\t\tFunction : forward_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                              /* 0x00000a00ff017b82 */
                                                                                       /* 0x000fe20000000800 */
        /*0010*/                   STL.64 [R1+0x8], R2 ;                               /* 0x0000080201007387 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], !UPT ;     /* 0x00e0000008187df0 */
        /*0030*/              @!P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ; /* 0x00e0000004187df0 */
        /*0040*/             @!UP1 UIADD3 UR4, UR4, 0x1, URZ ;                         /* 0x0000000104047890 */
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ;                /* 0x000000080404723c */
        /*11060*/              @P1 LDL R0, [R1] ;                                      /* 0x0000000001007983 */
"""


def test_parse():
    assert report.parse(USAGE, TEXT) == {"registers": 133, "stack": 16, "spills": 2, "wgmma": 2, "mma": 1}


@pytest.mark.parametrize(("usage", "text", "named"), [
    ("nothing", TEXT, "-res-usage"), (USAGE + USAGE, TEXT, "one function"), (USAGE, "nothing", "-sass"),
], ids=["no usage", "two functions", "no text"])
def test_parse_refuses_what_it_does_not_know(usage, text, named):
    with pytest.raises(ValueError, match=named):
        report.parse(usage, text)


def problems(line=LINE, committed=None, **changes):
    build = BUILD._replace(**changes)
    return list(report.compare([build], {build.name: line}, {build.name: line} if committed is None else committed))


def test_equal_lines_have_no_problem():
    assert problems() == []


def test_a_missing_line_is_named():
    missing, = problems(committed={})
    assert missing.startswith("forward half d64 sm_90: missing: ")


def test_a_stale_line_is_named():
    stale, = problems(committed={BUILD.name: LINE, "forward half d8 sm_90": LINE})
    assert stale.startswith("forward half d8 sm_90: stale: ")


@pytest.mark.parametrize("field", ["own", "registers", "spills", "shared", "wgmma", "mma"])
def test_a_changed_number_is_named(field):
    before = getattr(LINE, field)
    assert problems(replace(LINE, **{field: before + 1}), {BUILD.name: LINE}) == [
        f"forward half d64 sm_90: {field}: expected {before}, got {before + 1}"]


@pytest.mark.parametrize(("architecture", "limit"), [("sm_80", 166912), ("sm_90", 232448)])
def test_shared_memory_has_a_limit(architecture, limit):
    assert problems(replace(LINE, shared=limit), architecture=architecture) == []
    assert problems(replace(LINE, shared=limit + 4), architecture=architecture) == [
        f"{BUILD.name}: shared memory: expected at most {limit} bytes on {architecture}, got {limit + 4}"]


@pytest.mark.parametrize(("head_dim", "measured", "refused"), [
    (64, None, True), (128, None, True), (32, None, False), (256, None, False), (64, "H100, 2026-01-31", False)])
def test_a_large_stack_needs_a_measurement(head_dim, measured, refused):
    changes = {"head_dim": head_dim, "config": CONFIG._replace(measured=measured)}
    assert problems(replace(LINE, stack=64), **changes) == []
    found = problems(replace(LINE, stack=72), **changes)
    assert found == [f"{BUILD.name}: stack: expected at most 64 bytes per thread in a configuration that was not "
                     "measured, got 72"] * refused


def test_a_build_that_failed_is_not_compared():
    assert list(report.compare([BUILD], {}, {BUILD.name: LINE})) == []


def test_tables_are_read_as_written(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.read_table("1.2.3") == {}
    lines = {"b": LINE, "a": replace(LINE, apart=True)}
    written = report.write_table("1.2.3", lines)
    assert report.read_table("1.2.3") == lines
    assert len(written.read_text().splitlines()) == len(lines) + 2


@pytest.mark.parametrize("version", VERSIONS)
def test_committed_tables_cover_what_ships(version):
    committed = report.read_table(version)
    builds = {build.name: build for build in report.table_builds()}
    assert committed.keys() == builds.keys()
    assert len(builds) > len(CONFIGS) > 0
    for name, build in builds.items():
        line = committed[name]
        assert (line.own, line.other, line.warps, line.stages, line.apart, line.part) == build.config[:6], name
        assert list(report.compare([build], {name: line}, {name: line})) == []


class Recorder:
    """In the place of a kernel: keeps the arguments of its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append((self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs))

        return launch


def launches(monkeypatch, dtype, config):
    """The arguments of all launches of a complete first-order and second-order call, by the name of the launch."""
    recorded = []
    functions = {launch.function.__name__: launch.function for launch in report.LAUNCHES.values()}
    recorders = {name: Recorder(function, recorded) for name, function in functions.items()}
    monkeypatch.setattr(attention, "kernels", SimpleNamespace(**recorders))
    monkeypatch.setattr(attention, "architecture", lambda t: "sm_90")
    q, k = torch.zeros(1, 4, 64, 64, dtype=dtype), torch.zeros(1, 2, 64, 64, dtype=dtype)
    lse = torch.zeros(1, 4, 64)
    aux, options = (None,) * 5, (True, 0.125, None, None, 0.0, 0, None, None)
    every, none, no_tangents = (True,) * 3, (False,) * 3, (None,) * 3
    with override(**dict.fromkeys(KERNELS, config)):
        ops = torch.ops.gradmem
        ops.triton_attention_forward(q, k, k, None, None, None, None, None, *aux, *options)
        ops.triton_attention_forward(q, k, k, q, k, k, None, None, *aux, *options)
        ops.triton_attention_backward(q, k, k, *no_tangents, q, None, lse, None, None, q, none, every, *aux, *options)
        ops.triton_attention_backward(q, k, k, q, k, k, q, q, lse, lse, q, q, every, every, *aux, *options)
    names = ["forward", "dual_forward", "first-order statistics", "backward_queries", "backward_keys",
             "row_statistics", "dual_backward_queries", "dual_backward_keys", "backward_keys"]
    assert len(recorded) == len(names) - (not config.apart)
    return dict(zip(names, recorded, strict=False))


@needs_compiler
@pytest.mark.parametrize(("apart", "part"), [(False, None), (True, 32)])
@pytest.mark.parametrize(("dtype", "precision", "dtype_class"), [
    (torch.bfloat16, "highest", "half"), (torch.float32, "high", "tf32"), (torch.float32, "highest", "float32")])
def test_builds_are_what_attention_launches(dtype, precision, dtype_class, apart, part, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    launched = CONFIG._replace(apart=apart, part=part)
    found = launches(monkeypatch, dtype, launched)
    for kernel in report.LAUNCHES:
        config = report.STATISTICS if kernel == "row_statistics" else launched
        built = report.source(report._build(Key(kernel, dtype_class, 64, "sm_90"), config))
        function, arguments = found[kernel]
        assert built.fn is function
        names = built.fn.arg_names
        assert {names[i] for i, in built.constants} == {
            p.name for p in function.params if p.is_constexpr or arguments[p.name] is None}
        assert {names[i]: value for (i,), value in built.constants.items()} == {
            names[i]: arguments[names[i]] for i, in built.constants}
        assert all(len(built.signature[name]) == len(value) for name, value in arguments.items()
                   if isinstance(value, tuple))


@needs_compiler
def test_every_feature_changes_the_build():
    for feature in report.FEATURES:
        for kernel in feature.kernels:
            build = report.Build("", kernel, feature.element, feature.head_dim, "sm_90", CONFIG, feature)
            plain = BUILD._replace(kernel=kernel)
            assert report.source(build).hash() != report.source(plain).hash(), (feature.name, kernel)


@needs_compiler
def test_hopper_multiplies_by_warp_groups(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    line = report.compile_build(BUILD)
    assert line.wgmma > 0
    assert line.mma == 0
    assert 0 < line.registers <= 255
    assert 0 < line.shared <= report.SHARED_LIMITS["sm_90"]


@pytest.mark.parametrize(("arguments", "named"), [
    (["--quick", "--update"], "--update"), (["--jobs", "0"], "--jobs: expected at least 1, got 0")],
    ids=["update", "jobs"])
def test_bad_arguments_are_refused(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "compile-report", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert named in capsys.readouterr().err


def test_a_problem_fails_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "table_builds", lambda: [BUILD])
    monkeypatch.setattr(report, "feature_builds", list)
    monkeypatch.setattr(report, "_compile_all", lambda builds, jobs, console: ({BUILD.name: LINE}, []))
    monkeypatch.setattr(report, "INTERPRETED", False)
    assert report.main([]) == 1
    assert report.main(["--update"]) == 0
    assert report.main([]) == 0
    table, = tmp_path.iterdir()
    assert json.loads(table.read_text())[BUILD.name]["registers"] == LINE.registers
    monkeypatch.setattr(report, "_compile_all", lambda builds, jobs, console: ({}, ["it does not compile"]))
    capsys.readouterr()
    assert report.main(["--update"]) == 1
    assert "it does not compile" in capsys.readouterr().out
    assert json.loads(table.read_text())
