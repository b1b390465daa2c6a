"""What `python -m benchmarks report` writes, and that it is what the committed rows say."""

import json
from dataclasses import asdict, replace

import pytest

from benchmarks import plots, report, rows
from benchmarks import report_tables as tables
from benchmarks.harness import Provenance, Row

WHERE = Provenance(device="a CPU", threads=2, python="3.11", torch="2.13", triton=None, driver=None, commit="a" * 40,
                   modified=False, date="2026-01-02T00:00:00+00:00", environment={},
                   allocator="glibc 2.36, default settings")
NOTHING: dict[str, list[Row]] = {suite: [] for suite in report.SUITES}
SHAPE = {"batch": 2, "context_tokens": 9, "steps": 2, "width": 16}


def row(provider="eager", mode="create_graph", **values):
    base = Row(suite="meta-step", step="paper", provider=provider, mode=mode, dtype="float32", shape=SHAPE,
               median_ms=200.0, q20_ms=190.0, q80_ms=210.0, ratio_to_eager=1.0, peak_live_bytes=2**20, provenance=WHERE)
    return replace(base, **values)


def test_the_committed_page_is_what_the_rows_say():
    stored = report.stored()
    assert report.PAGE.read_text() == report.page(stored)
    assert report.README.read_text() == report.readme(report.README.read_text(), stored)


def test_every_plot_of_the_page_is_there():
    named = {line.partition("](img/")[2][:-1] for line in report.PAGE.read_text().splitlines() if line.startswith("![")}
    folder = report.PAGE.parent / "img"
    assert named == {path.name for path in folder.glob("*.svg")}
    assert all("commit" in (folder / name).read_text() for name in named)
    assert all((folder / name).stat().st_size < 50_000 for name in named)


def test_a_table_names_what_it_was_measured_with():
    sentence = tables.provenance([row(), row("gradmem", "step")], "python -m benchmarks meta-step")
    assert sentence == ("Measured with `python -m benchmarks meta-step`: a CPU, 2 threads, torch 2.13, Triton none, "
                        "Python 3.11, glibc 2.36, default settings, commit aaaaaaa, 2026-01-02.")
    # rows of the paper's code need a checkout of it
    assert "`c --peer-path DIR`" in tables.provenance([row(), row("paper-code", "create_graph")], "c")


def test_rows_of_the_newest_run_alone():
    """What a table compares is of one commit; another shape keeps its own, and a GPU's rows are apart."""
    later = replace(WHERE, commit="b" * 40, date="2026-02-02T00:00:00+00:00")
    old, new = row("gradmem", "step"), row(provenance=later)
    other = row(shape={**SHAPE, "batch": 3})
    gpu = row(provenance=replace(later, cuda="13.0"))
    assert tables.newest([old, new, other, gpu], cuda=False) == [new, other]
    assert tables.newest([old, new, other, gpu], cuda=True) == [gpu]
    again = replace(new, median_ms=1.0)
    assert tables.newest([new, again], cuda=False) == [again]


def test_a_table_of_meta_steps():
    lines = tables.meta_step([row(), row("gradmem", "step", median_ms=50.0, ratio_to_eager=0.25, peak_live_bytes=2**19,
                                         roofline=0.125, minor_faults=7.0)])
    assert lines[0] == "|  | ms | 20-80 % | of eager | peak MiB | of eager | faults | of the ceiling | steps/s |"
    assert lines[3] == '| `recompute="step"` | 50 | 190-210 | 0.25 | 0.5 | 0.50 | 7 | 12 % | 20 |'


def test_what_has_no_rows_is_not_measured_yet():
    text = report.page(NOTHING)
    assert text.count("not measured yet") == sum(part is not None for s in report.SECTIONS for part in s.parts.values())
    text = report.page({**NOTHING, "meta-step": [row()]})
    assert "Times of `no-page-faults`: not measured yet" in text
    assert "Times of `paper`" not in text


def test_the_readme_needs_its_markers():
    with pytest.raises(SystemExit, match="expected one part between <!-- generated: meta-step long-context -->"):
        report.readme("nothing", NOTHING)


def test_check_tells_what_is_stale(monkeypatch, capsys):
    assert report.main(["--check"]) == 0
    stored = report.stored()
    stored["memory"] = [replace(r, peak_live_bytes=1) for r in stored["memory"]]
    monkeypatch.setattr(report, "stored", lambda: stored)
    assert report.main(["--check"]) == 1
    assert "docs/performance.md is not what the rows say" in capsys.readouterr().out


def test_rows_that_were_stored_come_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.append(path, [row()])
    assert rows.load(path) == [row()]
    old = json.loads(path.read_text())
    del old["roofline"], old["provenance"]["allocator"]
    path.write_text(json.dumps(old) + "\n")
    (found,) = rows.load(path)
    assert (found.roofline, found.provenance.allocator) == (None, None)
    assert asdict(found)["median_ms"] == 200.0


def test_plots_without_rows_are_removed(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "old-cpu.svg").write_text("stale")
    written = plots.draw(tmp_path, {**NOTHING, "meta-step": [row(), row("gradmem", "step")]})
    assert {path.name for path in written} == {"time-cpu.svg", "memory-cpu.svg"} == {p.name for p in tmp_path.iterdir()}
    assert "a CPU, 2 threads, torch 2.13, Triton None, commit aaaaaaa" in written[0].read_text()
    before = written[0].read_bytes()
    assert plots.draw(tmp_path, {**NOTHING, "meta-step": [row(), row("gradmem", "step")]})
    assert written[0].read_bytes() == before
