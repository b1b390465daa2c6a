"""What the compile report refuses of CUDA C++ kernels; the report itself: `make compile-report`."""

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import compile_cuda as report
from gradmem_kernels.native.kernel_attributes import KernelAttributes

LINE = KernelAttributes(registers=32, stack=0, shared=512)
NAME = "norm_forward_kernel<float> sm_80"


@pytest.mark.parametrize("field", ["registers", "shared"])
def test_every_changed_number_is_named(field):
    before = getattr(LINE, field)
    assert list(report.compare({NAME: LINE._replace(**{field: before + 1})}, {NAME: LINE})) == [
        f"{NAME}: {field}: expected {before}, got {before + 1}"]


def test_other_problems_are_named():
    assert list(report.compare({NAME: LINE._replace(stack=8)}, {})) == [
        f"{NAME}: stack: expected 0 bytes per thread, got 8"]
    assert list(report.compare({NAME: LINE}, {"old": LINE})) == [
        f"{NAME}: missing: expected in the table, which --update writes",
        "old: stale: in the table, but there is no such kernel"]
    assert list(report.compare({NAME: LINE}, {NAME: LINE})) == []


def test_tables_are_written_where_there_are_no_problems(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "kernel_attributes", lambda *modules: {NAME: LINE})
    arguments = ["--module", "_cuda.so", "--toolkit", "1.2.3"]
    assert report.main(arguments) == 0
    assert "CUDA 1.2.3 has no table" in capsys.readouterr().out
    assert report.main([*arguments, "--update"]) == 0
    assert json.loads((tmp_path / "compile-report-cuda-1.2.3.json").read_text()) == {
        NAME: {"registers": 32, "stack": 0, "shared": 512}}
    assert report.read_table("1.2.3") == {NAME: LINE}
    monkeypatch.setattr(report, "kernel_attributes", lambda *modules: {NAME: LINE._replace(registers=40)})
    assert report.main(arguments) == 1
    monkeypatch.setattr(report, "kernel_attributes", lambda *modules: {NAME: LINE._replace(stack=40)})
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
