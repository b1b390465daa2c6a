"""``--compare``: two revisions of the library under the same benchmarks."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import compare
from benchmarks.harness import Row
from benchmarks.rows import append, key

ROW = Row("memory", "meta-step", "gradmem", "step", "float32", {"batch": 2}, median_ms=2.0, peak_live_bytes=100)


def test_ratios_are_within_rounds():
    here = [{key(ROW): replace(ROW, median_ms=ms)} for ms in (1.0, 2.0, 30.0)]
    there = [{key(ROW): replace(ROW, median_ms=ms, peak_live_bytes=400)} for ms in (2.0, 2.0, 10.0)]
    (_, _, quantiles), = compare.ratios(here, there).values()
    assert quantiles == pytest.approx((0.7, 1.0, 2.2))
    assert compare.table(compare.ratios(here, there), "old").columns[-1]._cells == ["0.250"]
    assert not compare.ratios(here, [{}] * 3)
    (_, _, quantiles), = compare.ratios(here, [there[0], {}, there[2]]).values()
    assert quantiles == pytest.approx((1.0, 1.75, 2.5))


def test_words_of_a_process():
    words = ["memory", "--compare", "HEAD~1", "--quick", "--repeats", "9", "--threads", "1"]
    assert compare.arguments(words) == ["memory", "--quick", "--threads", "1", "--repeats", "3"]
    assert compare.arguments(["memory", "--compare=HEAD", "--repeats=4"]) == ["memory", "--repeats", "3"]
    paths = [compare.arguments(["meta-step", *words, "--compare", "x"])[2]
             for words in (["--peer-path", "a"], ["--peer-path=a"])]
    assert paths == [str(Path("a").absolute())] * 2


@pytest.mark.parametrize(("arguments", "named"), [
    (["memory", "--compare", "HEAD", "--store"], "--compare: expected one suite"),
    (["all", "--compare", "HEAD"], "--compare: expected one suite"),
    (["memory", "--compare", "no-such-revision"], "expected a git revision, got 'no-such-revision'"),
    (["memory", "--comp", "HEAD"], "unrecognized arguments: --comp"),
    (["attention", "--peer-path", "x"], "--peer-path: attention does not measure"),
    (["all", "--only", "x"], "--only: all runs every part")],
    ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_bad_arguments_are_refused(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as raised:
        command.main()
    assert named in capsys.readouterr().err + str(raised.value)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A library of two revisions, whose benchmarks write the row that each is worth."""
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=tmp_path, check=True,
                       capture_output=True)

    git("init", "-q")
    (tmp_path / ".gitignore").write_text("build/\n__pycache__/\n*.so\n")
    for folder in ("gradmem_kernels/native", "python/gradmem", "benchmarks"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "gradmem_kernels" / "__init__.py").write_text("SPEED = 8.0\n")
    append(tmp_path / "row.jsonl", [ROW])
    (tmp_path / "benchmarks" / "__main__.py").write_text("raise SystemExit('of the old revision')\n")
    git("add", "-A")
    git("commit", "-qm", "old")
    (tmp_path / "gradmem_kernels" / "__init__.py").write_text("SPEED = 2.0\n")
    (tmp_path / "benchmarks" / "__main__.py").write_text(
        "import json, sys, gradmem_kernels\nrow = json.loads(open('row.jsonl').read())\n"
        "row['median_ms'] = gradmem_kernels.SPEED\nopen(sys.argv[-1], 'w').write(json.dumps(row) + '\\n')\n")
    (tmp_path / "gradmem_kernels" / "native" / "_cpu.x.so").touch()
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    return tmp_path


def test_two_revisions(repository, capsys):
    """Each with its own library, both under the benchmarks of this tree, uncommitted as it is; what differs in compiled
    kernels is said."""
    from rich.console import Console

    order = []
    measure = compare.measure
    compare_measure = pytest.MonkeyPatch()
    compare_measure.setattr(compare, "measure", lambda tree, words: order.append(tree.name) or measure(tree, words))
    try:
        assert compare.main("HEAD", ["memory", "--compare", "HEAD"], 2, Console(width=200)) == 0
    finally:
        compare_measure.undo()
    printed = capsys.readouterr().out
    assert "0.250" in printed
    assert "the revision has NO compiled CPU kernels (it has no build of them)" in printed
    there = next(iter((repository / "build" / "compare").iterdir())).name
    assert order == [repository.name, there, there, repository.name]
    assert Path(repository, "gradmem_kernels", "__init__.py").read_text() == "SPEED = 2.0\n"


def test_a_process_that_fails_half_way_is_no_measurement(repository):
    """What it had written by then would pass for all of its rows; one that refuses a provider has the others'."""
    main = repository / "benchmarks" / "__main__.py"
    write = "import sys\nopen(sys.argv[-1], 'w').write(open('row.jsonl').read())\n"
    main.write_text(write + "raise RuntimeError('half way')\n")
    with pytest.raises(SystemExit, match="half way"):
        compare.measure(repository, ["memory"])
    main.write_text(write + f"print({command.REFUSED!r} + 'peer: wrong')\nsys.exit(1)\n")
    assert compare.measure(repository, ["memory"]) == [ROW]


def test_kernels_for_cuda_are_compiled_where_they_run_alone(repository, monkeypatch):
    monkeypatch.delenv("GRADMEM_CUDA", raising=False)
    for name in ("CMakeLists.txt", "setup.py"):
        (repository / name).touch()
    said = []
    monkeypatch.setattr(compare, "_run", lambda command, tree, **environment: said.append(environment)
                        or subprocess.CompletedProcess(command, 0, "", ""))
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: False)
    compare._compile(repository)
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: True)
    compare._compile(repository)
    assert said == [{"GRADMEM_CUDA": "off"}, {"GRADMEM_CUDA": "auto"}]
