"""The attention suite and the search for configurations: what they measure, refuse and print."""

import itertools
import sys
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import attention as suite
from benchmarks import harness, provenance, tune
from benchmarks.attention import Part, check, fastest_first_order, measure
from benchmarks.attention_providers import (
    EAGER,
    MODES,
    PROVIDERS,
    Functions,
    Provider,
    Shape,
    draw,
    head_by_head,
    plain,
    prepare,
)
from benchmarks.live_memory import peak_live_bytes
from gradmem_kernels.backend import BackendError
from gradmem_kernels.triton.attention_configs import HEAD_DIMS, KERNELS, Config, Key

SMALL = Shape(2, 4, 2, 9, 8)
QUICK = harness.Options(quick=True, repeats=2)
BY_NAME = {provider.name: provider for provider in PROVIDERS}
HERE = ("eager", "gradmem", "flash")


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch):
    """A process of its own does not know the providers that tests make; test_benchmarks.py runs real ones."""
    monkeypatch.setattr(suite, "peak_rss", lambda *_: 1)


def part(shape=SMALL, modes=MODES, **options):
    return Part(torch.float32, [shape], modes, **options)


def found_by(part):
    report = measure(part, SMALL, QUICK)
    return report.rows, report.refused


@pytest.mark.parametrize("causal", [0, 1])
def test_exact_results_head_by_head(causal):
    """Those of all heads at once, whose key heads are shared."""
    shape = replace(SMALL, causal=causal)
    data = draw(shape, torch.float64, "cpu")
    exact = head_by_head(shape, data)

    def expanded(q, k, v):
        return plain(shape).attention(q, *(t.repeat_interleave(2, dim=1) for t in (k, v)))

    f = Functions(expanded, lambda q, k, v, *x_t: torch.func.jvp(expanded, (q, k, v), x_t))
    names = set()
    for mode in MODES:
        for name, t in prepare(mode, f, data)().items():
            torch.testing.assert_close(exact[name], t)
            names.add(name)
    assert names == set(exact)


def test_every_provider_here_is_admitted():
    found = check([BY_NAME[name] for name in HERE], part(), SMALL, "cpu")
    assert {(provider.name, mode) for provider, mode in found} == {
        (name, mode) for name in HERE for mode in BY_NAME[name].modes}
    assert all(of.wrong is None and of.unavailable is None and of.error < 1e-6 for of in found.values()), found


def test_wrong_results_get_no_time(monkeypatch):
    def slightly_wrong(shape):
        f = EAGER.load(shape)
        return Functions(lambda q, k, v: f.attention(q, k, v) * (1 + 1e-4), f.dual)

    wrong = Provider("peer", slightly_wrong, MODES)
    monkeypatch.setattr(suite, "PROVIDERS", (EAGER, wrong))
    rows, refused = found_by(part())
    assert {row.mode for row in rows if row.provider == "peer"} == {"dual_forward", "dual_backward"}
    assert len(refused) == 4
    assert all("peer" in reason and "wrong against float64" in reason and "S 9" in reason for reason in refused)


@pytest.mark.parametrize(("name", "raised", "refused"), [
    ("peer", ImportError("not here"), False), ("peer", AssertionError(), False), ("gradmem", RuntimeError("bug"), True),
    ("gradmem", BackendError("not served"), False),
    ("gradmem", torch.OutOfMemoryError("all of it"), False)], ids=str)
def test_who_does_not_run_is_named_with_the_reason(name, raised, refused, monkeypatch):
    """A peer may be missing; an error of the library's own is one."""
    def load(shape):
        raise raised

    monkeypatch.setattr(suite, "PROVIDERS", (EAGER, Provider(name, load, ("forward",))))
    rows, reasons = found_by(part(modes=("forward",)))
    missing = [row for row in rows if row.provider == name]
    if refused:
        assert not missing
        assert "RuntimeError: bug" in reasons[0]
    else:
        assert [row.median_ms for row in missing] == [None]
        assert missing[0].unavailable
        assert not reasons
    assert suite.table(rows)


def test_rows_of_a_shape(monkeypatch):
    monkeypatch.setattr(suite, "PROVIDERS", tuple(BY_NAME[name] for name in HERE))
    monkeypatch.setitem(suite.CHECKED_LENGTH, "cpu", 8)
    rows, refused = found_by(part())
    assert not refused
    assert len(rows) == 2 * len(MODES) + 2
    for row in rows:
        assert row.shape == asdict(SMALL)
        assert row.checked_shape == {**row.shape, "length": 8}
        assert row.q20_ms <= row.median_ms <= row.q80_ms
        assert row.peak_live_bytes > 0
        assert row.price > 0
        assert row.tflops == pytest.approx(SMALL.flops(row.mode) / row.median_ms * 1e-9)
    first = {row.price_of for row in rows}
    assert len(first) == 1
    assert first <= set(HERE)
    assert all(row.ratio_to_eager == 1 for row in rows if row.provider == "eager")


def test_flops():
    shape = Shape(2, 3, 1, 10, 4, causal=0)
    product = 2 * 2 * 3 * 10 * 10 * 4
    assert [shape.flops(mode) / product for mode in MODES] == [2, 5, 12, 6, 15, 28]
    assert replace(shape, causal=1).flops("step") == 14 * product


def test_bytes():
    """What each mode must move: q, o and their kin of 3 heads, k and v of 1."""
    shape = Shape(2, 3, 1, 10, 4)
    rows = 2 * 10 * 4 * 2
    tensors = {"forward": (2, 2), "backward": (4, 4), "double_backward": (6, 6), "dual_forward": (4, 4),
               "dual_backward": (8, 8), "step": (18, 18)}
    for mode, (queries, keys) in tensors.items():
        assert shape.bytes(mode, torch.bfloat16) == rows * (3 * queries + keys)


def test_price_is_of_the_fastest_first_order():
    a, b, c = (Provider(name, EAGER.load, MODES) for name in "abc")
    seconds = {(a, "forward"): [1.0, 1.0], (a, "backward"): [3.0, 3.0], (b, "forward"): [2.0, 2.0],
               (b, "backward"): [1.0, 1.5], (c, "forward"): [0.1, 0.1]}
    assert fastest_first_order(seconds) == (b, [3.0, 3.5])
    assert fastest_first_order({(c, "forward"): [0.1]}) is None


def test_memory_of_the_double_backward():
    """The memory sweep's claim: linear in the length for the library, quadratic for plain PyTorch."""
    peaks = {}
    for name in ("eager", "gradmem"):
        for length in (1024, 2048):
            shape = Shape(1, 1, 1, length, 16)
            f, data = BY_NAME[name].load(shape), draw(shape, torch.float32, "cpu")
            peaks[name, length] = peak_live_bytes(lambda f=f, data=data: prepare("double_backward", f, data)())
    assert peaks["gradmem", 2048] < 2.2 * peaks["gradmem", 1024]
    assert peaks["eager", 2048] > 3.5 * peaks["eager", 1024]


def test_score_matrices_that_do_not_fit_are_not_tried(monkeypatch):
    """On a CPU that would end the process, not raise."""
    monkeypatch.setattr(suite, "free_memory", lambda device: 2**30)
    shape = Shape(1, 1, 1, 2**13, 32)
    found = {(name, length): suite.too_large(BY_NAME[name], replace(shape, length=length), torch.float32, "cpu")
             for name in ("eager", "gradmem") for length in (2**12, 2**13)}
    assert found.pop(("eager", 2**13)) == "would keep about 2 GiB of score matrices"
    assert not any(found.values())
    monkeypatch.setattr(suite, "free_memory", lambda device: 0)
    rows, wrong = found_by(part(modes=("double_backward",), timed=False))
    assert not wrong
    assert {row.provider: row.peak_live_bytes is None for row in rows if row.provider in HERE}["eager"]
    assert all(row.peak_live_bytes for row in rows if row.provider == "gradmem")


def test_interleave_prepared():
    """Each is prepared in each round, run untimed once and timed once; what runs out of memory is left out."""
    log = []

    def clock(work):
        work()
        return 7.0

    def make(name):
        log.append(name.upper())
        return lambda: log.append(name)

    def fails():
        raise torch.OutOfMemoryError

    steps = {"a": lambda: make("a"), "b": lambda: make("b"), "c": fails}
    found = harness.interleave_prepared(steps, QUICK, clock)
    assert {name: samples.seconds for name, samples in found.items()} == {"a": [7.0, 7.0], "b": [7.0, 7.0]}
    assert all(len(samples.minor_faults) == 2 for samples in found.values())
    assert "".join(log) == "Aaa" + "Bbb" + "Bbb" + "Aaa"
    assert harness.wall_clock(lambda: None) >= 0


def test_rows_of_a_gpu():
    """Their memory is the device's, and they say that the cache was flushed."""
    where = replace(harness.Provenance.here(), cuda="13.0", device="a GPU")
    base = harness.Row("attention", "attention", "", "", "bfloat16", asdict(SMALL), provenance=where)
    row = suite._row(base, (EAGER, "step"), harness.Found(1e-3, 1e-3, 99),
                     {(EAGER, "step"): harness.Samples([0.5], [7])}, SMALL, torch.bfloat16)
    assert (row.peak_device_bytes, row.peak_live_bytes, row.l2, row.median_ms) == (99, None, "flushed", 500.0)
    assert row.minor_faults is row.peak_rss_bytes is None


def test_the_commit_may_be_named(monkeypatch):
    monkeypatch.setattr(provenance, "_git", lambda *args: None)
    monkeypatch.delenv("GRADMEM_COMMIT", raising=False)
    with pytest.raises(SystemExit, match="GRADMEM_COMMIT"):
        provenance.check_storable(harness.Provenance.here())
    monkeypatch.setenv("GRADMEM_COMMIT", "f" * 40)
    where = harness.Provenance.here()
    provenance.check_storable(where)
    assert (where.commit, where.environment["GRADMEM_COMMIT"]) == ("f" * 40, "f" * 40)


@pytest.mark.parametrize(("arguments", "named"), [
    (["attention", "--quick", "--only", "nothing"], "expected parts of small, paper, memory"),
    (["memory", "--quick", "--only", "small"], "memory has no parts"),
    (["footprint", "--quick", "--device", "cuda"], "--device: footprint runs on cpu"),
    (["attention", "--quick", "--device", "tpu"], "--device: attention runs on cpu or cuda"),
    (["tune", "--max-candidates", "0"], "--max-candidates: expected at least 1, got 0")],
    ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_bad_arguments_are_refused(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as raised:
        command.main()
    assert named in capsys.readouterr().err + str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("arguments", [["attention", "--device", "cuda"], ["tune"]], ids=" ".join)
def test_without_a_gpu(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert "no CUDA device here" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates(kernel):
    for dtype, head_dim in itertools.product(tune.DTYPES, HEAD_DIMS):
        configs = tune.candidates(Key(kernel, dtype, head_dim, "sm_90"))
        assert 5 <= len(configs) == len(set(configs))
        # row statistics lie in blocks of 128 rows, which a tile must not straddle
        assert all(128 % config.own == 128 % config.other == 0 for config in configs)
        assert any(config.apart for config in configs) == (kernel == "dual_backward_keys")


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_work_alone(kernel):
    """What is timed for a kernel are results of the formula, and those that this kernel computes."""
    data = draw(SMALL, torch.float64, "cpu")
    exact = head_by_head(SMALL, data)
    found = tune.prepare_kernel(kernel, data, backend="reference")()
    assert max(suite.errors(found, exact).values()) < 1e-10
    side = {"queries": "q", "keys": "kv"}.get(kernel.rpartition("_")[2])
    if side:
        per = 2 if kernel.startswith("dual") else 1
        assert len(found) == per * len(side)
        assert all(name.removesuffix("_t")[-1] in side for name in found)


@pytest.mark.parametrize(("most", "expected"), [
    (None, [*range(10)]), (6, [0, 1, 3, 5, 6, 8]), (1, [0]), (99, [*range(10)])])
def test_candidates_are_spread(most, expected):
    assert tune.spread(range(10), most) == expected


def test_search():
    """Candidates are run under their own configuration; wrong ones and those that fail have no time."""
    fast, slow, wrong, broken = (Config(own, 32, 4, 1) for own in (16, 32, 64, 128))
    from gradmem_kernels.triton import attention_configs

    def current():
        return attention_configs.choose("forward", torch.float32, 64, "interpreter")

    def check():
        if current() == broken:
            raise RuntimeError("out of resource: shared memory\nmore")
        return "wrong" if current() == wrong else None

    def clock(work):
        work()
        return {fast: 1.0, slow: 2.0}[current()]

    found = tune.search("forward", [broken, slow, wrong, fast], check, current, clock)
    assert found == [tune.Found(fast, 1.0), tune.Found(slow, 2.0),
                     tune.Found(broken, None, "RuntimeError: out of resource: shared memory"),
                     tune.Found(wrong, None, "wrong")]
    assert current() == attention_configs.INTERPRETER


def test_printed_entries_are_the_table():
    key, old, new = Key("dual_backward_keys", "half", 128, "sm_90"), Config(32, 64, 4, 2), Config(64, 64, 8, 2, True)
    found = [tune.Found(new, 0.001), tune.Found(old, 0.002), tune.Found(Config(128, 128, 4, 3), None, "too large")]
    first, *comments = tune.report(key, old, found, "NVIDIA H100", "2026-11-25")
    table = eval("{" + first + "}", {"Key": Key, "Config": Config})
    assert table == {key: new._replace(measured="NVIDIA H100, 2026-11-25")}
    before = "Config(own=32, other=64, warps=4, stages=2, apart=False, part=None)"
    assert comments == [f"    # 1.000 ms; before, {before}: 2.000 ms",
                        "    # 2 of 3 candidates work",
                        "    # Config(own=128, other=128, warps=4, stages=3, apart=False, part=None): too large"]
    assert "no candidate works, the first because of too large" in next(tune.report(key, None, found[2:], "", ""))
