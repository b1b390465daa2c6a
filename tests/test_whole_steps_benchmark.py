"""The suites of WRITE alone and of training and answers, ceilings, the paper's code, and allocators."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import end_to_end, harness, inner_step, meta_step_parts, peer, provenance, roofline, whole_steps
from benchmarks.meta_step import admit
from benchmarks.meta_step_providers import EAGER, PEER, PROVIDERS, Provider, make_step
from benchmarks.shapes import QUICK, Shape
from gradmem import GradMem
from gradmem_kernels import Decoder

OPTIONS = harness.Options(quick=True, repeats=2)


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch):
    monkeypatch.setattr(whole_steps, "peak_rss", lambda *_: 1)


@pytest.mark.parametrize("suite", [inner_step, end_to_end])
def test_both_sides_compute_the_same(suite):
    report = harness.merged(suite.run(OPTIONS))
    assert not report.refused
    assert {row.provider for row in report.rows} == {"eager", "gradmem"}
    for row in report.rows:
        assert row.error < 1e-4
        assert row.q20_ms <= row.median_ms <= row.q80_ms
        assert min(row.peak_live_bytes, row.peak_rss_bytes, row.tflops, row.must_bytes, row.tokens_per_second) > 0
        assert row.minor_faults is not None
        assert row.provenance.allocator
    assert {row.ratio_to_eager for row in report.rows if row.provider == "eager"} == {1.0}


@pytest.mark.parametrize("suite", [inner_step, end_to_end])
def test_a_wrong_library_gets_no_time(suite, monkeypatch):
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda *args, **options: 1.001 * forward(*args, **options))
    report = harness.merged(suite.run(OPTIONS))
    assert {row.provider for row in report.rows} == {"eager"}
    assert report.refused
    assert all("wrong against float64" in reason for reason in report.refused)


@pytest.mark.parametrize("suite", [inner_step, end_to_end])
def test_a_library_that_raises_does_not_cost_the_others_their_rows(suite, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("bug")

    monkeypatch.setattr(Decoder, "forward", fails)
    report = harness.merged(suite.run(OPTIONS))
    assert {row.provider for row in report.rows} == {"eager"}
    assert all(row.median_ms for row in report.rows)
    assert all(reason.endswith("RuntimeError: bug") for reason in report.refused)
    assert report.refused


def test_wrong_answers_get_no_time(monkeypatch):
    """What is timed is what is checked: the tokens, not the logits of one pass alone."""
    generate = GradMem.generate
    monkeypatch.setattr(GradMem, "generate", lambda *args, **options: generate(*args, **options) + 1)
    report = harness.merged(end_to_end.run(OPTIONS))
    reason, = report.refused
    assert "gradmem step answer: wrong against float64: tokens" in reason
    assert {row.provider for row in report.rows if row.step == "answer"} == {"eager"}


def test_rates_count_inner_steps_and_their_tokens(monkeypatch):
    monkeypatch.setattr(whole_steps, "clock_of", lambda device: lambda work: 0.5)
    rows = harness.merged(inner_step.run(OPTIONS)).rows
    found = {row.shape["steps"]: row for row in rows if row.provider == "gradmem"}
    assert [found[k].steps_per_second for k in (1, 2)] == [2.0, 4.0]
    assert found[2].tokens_per_second == 2 * QUICK.batch * QUICK.context_tokens / 0.5
    assert found[2].tflops == pytest.approx(4 * replace(QUICK).forward(QUICK.context_tokens) / 0.5 * 1e-12)


def test_what_a_step_must_spend():
    shape = Shape(layers=1, heads=2, kv_heads=1, width=4, intermediate=3, vocabulary=5, batch=2, context_tokens=3,
                  memory_tokens=2, query_tokens=2, steps=2)
    matrices = 4 * (2 * 4 + 2 * 2 + 3 * 3)
    assert shape.weights() == matrices + 2 * 5 * 4
    assert replace(shape, tied=1).weights() == matrices + 5 * 4
    assert shape.weight_bytes(torch.bfloat16) == (4 * 2 + 3) * shape.weights() * 2
    rows = 2 + 3 - 1
    assert shape.forward(3) == 2 * 2 * (rows * (matrices + 2 * rows * 4 / 2) + 3 * 4 * 5)
    assert shape.flops() == 2 * 6 * shape.forward(3) + 3 * shape.forward(2)


def test_the_ceiling_is_of_the_slower_resource(monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda *_: roofline.Ceilings(flops=100.0, bytes_s=10.0))
    row = harness.Row("ops", "x", *EAGER, "float32", {}, median_ms=1e4)
    compute, memory, neither = roofline.attach(
        [replace(row, must_flops=500.0, must_bytes=10.0), replace(row, must_flops=100.0, must_bytes=80.0), row], "cpu")
    assert (compute.roofline, memory.roofline, neither.roofline) == (0.5, 0.8, None)
    assert (compute.ceiling_flops, compute.ceiling_bytes_s, neither.ceiling_flops) == (100.0, 10.0, None)


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(roofline, "clock_of", lambda device: lambda work: work() is None or 2.0)
    roofline.measure.cache_clear()
    found = roofline.measure("float32", "cpu", True)
    roofline.measure.cache_clear()
    assert found == (2.0 * 128**3 / 2.0, 2**16 / 2.0)


def test_a_ceiling_is_of_numbers_like_a_models(monkeypatch):
    """A GPU multiplies equal numbers faster than others: its clock depends on the power that they take."""
    seen, multiply = [], torch.mm

    def watched(a, b, out):
        seen.extend((a, b))
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    roofline.measure.cache_clear()
    roofline.measure("bfloat16", "cpu", True)
    roofline.measure.cache_clear()
    assert seen
    assert all(0.9 < t.float().std() < 1.1 for t in seen)


def test_allocators_are_told(monkeypatch):
    for name in list(provenance.os.environ):
        if name.startswith(provenance.ALLOCATION):
            monkeypatch.delenv(name)
    assert harness.Provenance.here().allocator.endswith(", default settings")
    for name, value in meta_step_parts.NO_PAGE_FAULTS.items():
        monkeypatch.setenv(name, value)
    assert harness.Provenance.here().allocator.endswith(", MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1")


def test_a_part_with_an_environment_runs_in_a_process_of_its_own():
    part = meta_step_parts.quick(meta_step_parts.CPU["no-page-faults"], "cpu")
    report = meta_step_parts.measure("no-page-faults", part, OPTIONS)
    assert not report.refused
    assert len(report.rows) == len(PROVIDERS)
    assert all("MALLOC_MMAP_MAX_=0" in row.provenance.allocator for row in report.rows)


def test_the_cases_of_a_cpu():
    """Long contexts with and without page faults, and the paper's model, each beside plain PyTorch."""
    shapes = {name: {(case.shape.batch, case.shape.context_tokens, case.shape.steps) for case in part.cases}
              for name, part in meta_step_parts.CPU.items()}
    assert shapes == {"paper": {(64, 112, 2)}, "long-context": {(2, 2048, 2)}, "no-page-faults": {(2, 2048, 2)}}
    for part in meta_step_parts.CPU.values():
        assert {case.provider for case in part.cases} == set(PROVIDERS)
        assert part.timed
        assert (part.dtype, part.cases[0].shape.layers, part.cases[0].shape.width) == (torch.float32, 4, 128)
    assert meta_step_parts.CPU["no-page-faults"].environment == {
        "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
    assert not meta_step_parts.CPU["long-context"].environment
    assert [name for name, part in meta_step_parts.CPU.items() if part.apart] == ["long-context", "no-page-faults"]


def test_a_process_of_its_own_has_a_resident_set_of_its_own():
    few, many = (harness.peak_rss(make_step, PROVIDERS[1], replace(QUICK, context_tokens=n, batch=8))
                 for n in (9, 2000))
    if few is None:
        pytest.skip("the system does not tell")
    assert few < many


def test_no_checkout_of_the_paper(tmp_path):
    with pytest.raises(SystemExit, match="--peer-path: expected a checkout"):
        peer.use(str(tmp_path))


def test_a_checkout_is_found_from_other_folders(tmp_path, monkeypatch):
    """Processes of their own start in the root of the clone."""
    given = []
    monkeypatch.setattr(command.SUITES["meta-step"], "run", lambda options: given.append(options.peer_path) or [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "meta-step", "--quick", "--peer-path", "checkout"])
    assert command.main() == 0
    assert given == [str(tmp_path / "checkout")]


@pytest.mark.parametrize("wrong", [False, True])
def test_the_papers_code_is_gated(wrong, monkeypatch):
    """A stand-in with the interface of its model, which is not copied here: the right loss is admitted, another not."""
    transformers = pytest.importorskip("transformers")

    class Model(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.model = transformers.AutoModelForCausalLM.from_config(config.base_config, attn_implementation="eager")
            self.mem = torch.nn.Parameter(torch.empty(config.n_mem_tokens, config.base_config.hidden_size))

        def read(self, memory, ids):
            rows = self.model.get_input_embeddings()(ids)
            logits = self.model(inputs_embeds=torch.cat([memory, rows], 1)).logits[:, memory.shape[1] - 1 : -1]
            return torch.nn.functional.cross_entropy(logits.mT, ids, reduction="none").mean(1)

        def forward(self, ids, labels):
            context, query = ids["context_input_ids"], ids["query_input_ids"]
            memory = self.mem.expand(len(context), -1, -1)
            for _ in range(self.config.K):
                grad, = torch.autograd.grad(self.read(memory, context).sum(), memory, create_graph=not wrong)
                memory = memory - self.config.lr * grad
            return {"loss": self.read(memory, query).mean()}

    monkeypatch.setitem(sys.modules, peer.MODULE, types.SimpleNamespace(
        GradMemGPT=Model, GradMemGPTConfig=lambda **options: types.SimpleNamespace(**options)))
    admitted, refused = admit([EAGER, PEER], QUICK)
    assert (PEER in admitted) != wrong
    assert bool(refused) == wrong


def test_without_the_papers_code_its_row_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, peer.MODULE, None)
    part = meta_step_parts.with_peer(meta_step_parts.Part([meta_step_parts.Case(EAGER, QUICK)], torch.float32, QUICK,
                                                          timed=False, counted=False, resident=False))
    eager, theirs = meta_step_parts.measure("paper", part, OPTIONS).rows
    assert eager.unavailable is None
    assert (theirs.provider, theirs.peak_live_bytes) == ("paper-code", None)
    assert "ModuleNotFoundError" in theirs.unavailable


def test_all_suites_in_turn(monkeypatch, capsys, tmp_path):
    ran = []

    def suite(name):
        row = harness.Row(name, "x", *Provider("eager", "y"), "float32", {})
        return types.SimpleNamespace(DEVICES=("cpu",), run=lambda options: ran.append((name, options.device)) or
                                     [harness.Report([row])], table=lambda rows: f"table of {rows[0].suite}")

    monkeypatch.setattr(command, "SUITES", {name: suite(name) for name in ("one", "two")})
    monkeypatch.setattr(command, "_compile_report",
                        lambda quick, console: ran.append(("compile-report", quick)) or False)
    rows = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "all", "--quick", "--device", "cpu", "--rows", str(rows)])
    assert command.main() == 0
    assert ran == [("one", "cpu"), ("two", "cpu"), ("compile-report", True)]
    assert "table of two" in capsys.readouterr().out
    assert [json.loads(line)["suite"] for line in rows.read_text().splitlines()] == ["one", "two"]
