"""What the compile report reads of CUDA C++ kernels, and refuses; the report itself: `make compile-report`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import compile_cuda as report

USAGE = """
Fatbin ptx code:
================
arch = sm_80

Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fv:
  REG:29 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z1gv:
  REG:255 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fv:
  REG:31 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LINE = report.Line(registers=32, stack=0, shared=512)
NAME = "norm_forward_kernel<float> sm_80"


def test_parse():
    assert report.parse(USAGE) == {"_Z1fv sm_80": report.Line(29, 0, 0), "_Z1gv sm_80": report.Line(255, 16, 1024),
                                   "_Z1fv sm_90a": report.Line(31, 0, 0)}
    with pytest.raises(ValueError, match="expected kernels, got 'nothing'"):
        report.parse("nothing")


@pytest.mark.parametrize(("name", "expected"), [
    ("void gradmem::(anonymous namespace)::f<(gradmem::Form)0, true, gradmem::(anonymous namespace)::BFloat16, 8>("
     "gradmem::ActivationForward, long) sm_80", "f<Form 0, true, BFloat16, 8> sm_80"),
    ("void gradmem::(anonymous namespace)::g<float, false, gradmem::(anonymous namespace)::Layout<4, 2, 32> >("
     "gradmem::NormForward) sm_90a", "g<float, false, Layout<4, 2, 32> > sm_90a")])
def test_readable_names(name, expected):
    assert report.readable(name) == expected


@pytest.mark.parametrize("field", ["registers", "shared"])
def test_every_changed_number_is_named(field):
    before = getattr(LINE, field)
    assert list(report.compare({NAME: replace(LINE, **{field: before + 1})}, {NAME: LINE})) == [
        f"{NAME}: {field}: expected {before}, got {before + 1}"]


def test_other_problems_are_named():
    assert list(report.compare({NAME: replace(LINE, stack=8)}, {})) == [
        f"{NAME}: stack: expected 0 bytes per thread, got 8"]
    assert list(report.compare({NAME: LINE}, {"old": LINE})) == [
        f"{NAME}: missing: expected in the table, which --update writes",
        "old: stale: in the table, but there is no such kernel"]
    assert list(report.compare({NAME: LINE}, {NAME: LINE})) == []


def test_tables_are_written_where_there_are_no_problems(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "measure", lambda *modules: {NAME: LINE})
    arguments = ["--module", "_cuda.so", "--toolkit", "1.2.3"]
    assert report.main(arguments) == 0
    assert "CUDA 1.2.3 has no table" in capsys.readouterr().out
    assert report.main([*arguments, "--update"]) == 0
    assert json.loads((tmp_path / "compile-report-cuda-1.2.3.json").read_text()) == {
        NAME: {"registers": 32, "stack": 0, "shared": 512}}
    assert report.read_table("1.2.3") == {NAME: LINE}
    monkeypatch.setattr(report, "measure", lambda *modules: {NAME: replace(LINE, registers=40)})
    assert report.main(arguments) == 1
    monkeypatch.setattr(report, "measure", lambda *modules: {NAME: replace(LINE, stack=40)})
    assert report.main([*arguments, "--update"]) == 1
    assert report.read_table("1.2.3") == {NAME: LINE}


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "compile-report", "--cuda", "--module", "_cuda.so"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--module and --toolkit: expected both or none" in capsys.readouterr().err


def test_committed_tables_have_no_spills():
    tables = list((Path(__file__).parent.parent / "benchmarks" / "results").glob("compile-report-cuda-*.json"))
    assert tables
    for file in tables:
        lines = report.read_table(file.stem.removeprefix("compile-report-cuda-"))
        assert {name.rpartition(" ")[2] for name in lines} == {"sm_80", "sm_90a"}
        assert all(line.stack == 0 for line in lines.values())
