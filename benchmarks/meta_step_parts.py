"""Parts of the meta-step suite that measure many shapes alike: the price of second order, long contexts, memory over K
and S. Most need a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import flops
from benchmarks.harness import (
    Clock,
    Found,
    Options,
    Provenance,
    Report,
    Row,
    Samples,
    attempt,
    clock_of,
    compared,
    interleave_prepared,
    peak_bytes,
    peak_rss,
    quantiles,
    relative_errors,
    timed,
)
from benchmarks.meta_step_providers import EAGER, FIRST_ORDER, GRAPHS, PEER, PROVIDERS, Provider, make_step
from benchmarks.on_meta import triton_on_meta
from benchmarks.provenance import ROOT
from benchmarks.rows import load
from benchmarks.shapes import BYTE_FORMULA, FLOP_FORMULA, LLAMA_1B, LLAMA_CHECKED, PAPER, QUICK, Shape

__all__ = ["CPU", "CUDA", "NO_PAGE_FAULTS", "Case", "Part", "measure", "quick", "with_peer"]


class Case(NamedTuple):
    provider: Provider
    shape: Shape


@dataclass(frozen=True)
class Part:
    """Cases that are compared with each other.

    Attributes:
        cases: what is measured.
        dtype: of everything but the memory.
        checked: the shape on which the providers are checked.
        timed: whether times are taken, beside peak memory.
        rounds: the most rounds, if there is a limit.
        warmup: calls before each timed one. Where a call takes seconds there are none: taking its peak memory has
            warmed it up.
        tf32: whether products of float32 may round their factors to TF32, everyone's.
        counted: whether operations are counted.
        apart: whether a process of its own measures it. glibc's allocator serves large tensors by what was freed
            before: what ran earlier in a process changes how many page faults there are.
        environment: of that process: what a C library reads when it starts.
        resident: whether the resident set of processes that run one case alone is taken, on a CPU.
    """

    cases: Sequence[Case]
    dtype: torch.dtype
    checked: Shape
    timed: bool = True
    rounds: int | None = None
    warmup: int = 1
    tf32: bool = False
    counted: bool = True
    apart: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    resident: bool = True


_LIBRARY = PROVIDERS[1:]
_LONG = replace(LLAMA_1B, context_tokens=32768, steps=8)
_FLAT = [replace(LLAMA_1B, steps=k) for k in (1, 2, 4, 8, 32)] + [
    replace(LLAMA_1B, context_tokens=s) for s in (1024, 2048, 8192, 16384, 32768)]
#: Parts by name, the most telling first.
CUDA = {
    "price": Part([*(Case(provider, LLAMA_1B) for provider in _LIBRARY),
                   Case(_LIBRARY[1], replace(LLAMA_1B, steps=0)), *(Case(first, LLAMA_1B) for first in FIRST_ORDER)],
                  torch.bfloat16, LLAMA_CHECKED),
    "paper": Part([Case(provider, PAPER) for provider in (*PROVIDERS, *GRAPHS)], torch.float32, PAPER, tf32=True),
    "long": Part([Case(provider, _LONG) for provider in _LIBRARY if provider.mode != "none"], torch.bfloat16,
                 LLAMA_CHECKED, rounds=2, warmup=0),
    "flat": Part([Case(provider, shape) for shape in _FLAT for provider in PROVIDERS], torch.bfloat16, LLAMA_CHECKED,
                 timed=False, counted=False),
}
#: How the command begins a line about what it refuses.
REFUSED = "refused, no numbers: "
#: glibc keeps what was freed instead of giving it back, so that after the warm-up nothing is a page fault.
NO_PAGE_FAULTS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
_LONG_CONTEXT = Part([Case(provider, replace(PAPER, context_tokens=2048, batch=2)) for provider in PROVIDERS],
                     torch.float32, replace(PAPER, batch=2), rounds=3, warmup=0, apart=True)
#: Tells a process which part it is of its own for.
_APART = "GRADMEM_BENCHMARK_PART"
CPU = {
    "paper": Part([Case(provider, PAPER) for provider in PROVIDERS], torch.float32, PAPER, rounds=3, warmup=0),
    "long-context": _LONG_CONTEXT,
    "no-page-faults": replace(_LONG_CONTEXT, environment=NO_PAGE_FAULTS, resident=False),
}


def quick(part: Part, device: str) -> Part:
    """The part on a tiny shape, in a dtype that every device computes in, with what the device has."""
    cases = [Case(provider, replace(QUICK, steps=min(shape.steps, 2))) for provider, shape in part.cases
             if device != "cpu" or provider not in GRAPHS]
    return replace(part, cases=list(dict.fromkeys(cases)), checked=QUICK, dtype=torch.float32)


def with_peer(part: Part) -> Part:
    """The paper's code too, wherever plain PyTorch is."""
    cases = [*part.cases, *(Case(PEER, shape) for provider, shape in part.cases if provider == EAGER)]
    return replace(part, cases=cases)


def measure(name: str, part: Part, options: Options, clock: Clock | None = None) -> Report:
    """Every provider is checked, then the peak memory of every case is taken, then times, interleaved.

    ``clock``: by default the one of the device.
    """
    if part.apart and os.environ.get(_APART) != name:
        return _elsewhere(name, part, options)
    device = options.device
    with _products(part):
        checked = {provider: check(provider, part, device) for provider in dict.fromkeys(who for who, _ in part.cases)}
        found = {case: _peak(case, checked[case.provider], part, device) for case in part.cases}
        samples: Mapping[Case, Samples] = {}
        if part.timed:
            prepared = {case: partial(make_step, case.provider, case.shape, part.dtype, device=device)
                        for case, of in found.items() if of.usable}
            rounds = replace(options, repeats=min(options.repeats, part.rounds or options.repeats),
                             warmup=part.warmup)
            samples = interleave_prepared(prepared, rounds, clock or clock_of(device))
            found |= {case: Found(unavailable="out of memory") for case in prepared.keys() - samples.keys()}
    dtype = "tf32" if part.tf32 else str(part.dtype).removeprefix("torch.")
    base = Row(suite="meta-step", step=name, provider="", mode="", dtype=dtype, shape={},
               provenance=Provenance.here(device))
    return Report([_row(base, part, case, of, samples) for case, of in found.items() if of.wrong is None],
                  list(dict.fromkeys(of.wrong for of in found.values() if of.wrong is not None)))


def _elsewhere(name: str, part: Part, options: Options) -> Report:
    """The same in a process of its own, started with the part's environment."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        command = [sys.executable, "-m", "benchmarks", "meta-step", "--only", name, "--device", options.device,
                   "--repeats", str(options.repeats), "--threads", str(torch.get_num_threads()), "--rows", str(rows)]
        command += ["--quick"] * options.quick
        command += ["--peer-path", options.peer_path] if options.peer_path else []
        done = subprocess.run(command, cwd=ROOT, env=os.environ | part.environment | {_APART: name},
                              capture_output=True, text=True, check=False)
        refused = [line.removeprefix(REFUSED) for line in done.stdout.splitlines() if line.startswith(REFUSED)]
        if done.returncode and not refused:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return Report(load(rows), refused)


def check(provider: Provider, part: Part, device: str) -> Found:
    """The provider against float64 and plain PyTorch, of the same order, on ``part.checked``."""
    plain = EAGER if provider not in FIRST_ORDER else FIRST_ORDER[-1]

    def errors() -> Found:
        exact, eager, ours = (
            make_step(who, part.checked, dtype, device=device, rounded=part.dtype)()
            for who, dtype in ((plain, torch.float64), (plain, part.dtype), (provider, part.dtype)))
        ours, eager = (relative_errors(result, exact) for result in (ours, eager))
        return compared(str(provider), ours, eager)

    return attempt(str(provider), errors)


def _peak(case: Case, checked: Found, part: Part, device: str) -> Found:
    # a graph's memory was taken when it was captured
    if not checked.usable or case.provider in GRAPHS:
        return checked
    return attempt(str(case.provider), lambda: checked._replace(
        peak=peak_bytes(make_step(case.provider, case.shape, part.dtype, device=device), device)))


def _row(base: Row, part: Part, case: Case, of: Found, samples: Mapping[Case, Samples]) -> Row:
    (provider, shape), cuda = case, base.provenance.cuda is not None
    row = replace(base, provider=provider.name, mode=provider.mode, shape=asdict(shape), error=of.error,
                  eager_error=of.eager_error, unavailable=of.unavailable,
                  checked_shape=None if part.checked == shape else asdict(part.checked),
                  **{"peak_device_bytes" if cuda else "peak_live_bytes": of.peak})
    if part.counted and of.usable:
        row = replace(row, **counts(case, part.dtype))
    if part.resident and of.usable and not cuda:
        row = replace(row, peak_rss_bytes=peak_rss(make_step, provider, shape, part.dtype))
    if case not in samples:
        return row
    if provider in FIRST_ORDER:
        return timed(row, samples[case])
    row = timed(row, samples[case], samples.get(Case(EAGER, shape)), flops=shape.flops(),
                moved=shape.weight_bytes(part.dtype))
    seconds = {other: of.seconds for other, of in samples.items()}
    return replace(row, flop_formula=FLOP_FORMULA, byte_formula=BYTE_FORMULA, steps_per_second=1e3 / row.median_ms,
                   **price(case, seconds))


def counts(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Operations of a step: counted on the meta device, where the same Python runs without data, and the model's. Empty
    where Triton, whose operators tell sizes there, is not installed."""
    provider, shape = case
    if provider == PEER or importlib.util.find_spec("triton") is None:  # its code is not for that device
        return {}
    known = provider.name.partition("-")[0] == "gradmem" and provider.mode != "first-order"
    twin = provider._replace(name="gradmem") if provider in GRAPHS else provider  # a replay has no Python to watch
    with triton_on_meta():
        out = {"executed_flops": sum(flops.executed(make_step(twin, shape, dtype, device="meta")).values())}
    return out | ({"model_flops": sum(flops.model(shape, provider.mode).values())} if known else {})


def price(case: Case, seconds: Mapping[Case, list[float]]) -> dict[str, Any]:
    """The time of an inner step over that of the fastest first-order step of the same round, and who ran the latter.

    An inner step takes the meta-step's time less that of the same meta-step without inner steps, over K. Empty where
    the part does not have all of them.
    """
    provider, shape = case
    read = next((times for other, times in seconds.items() if other.shape == replace(shape, steps=0)), None)
    firsts = {first: seconds[first, shape] for first in FIRST_ORDER if (first, shape) in seconds}
    if provider in FIRST_ORDER or shape.steps == 0 or read is None or not firsts:
        return {}
    first, base = min(firsts.items(), key=lambda item: quantiles(item[1])[1])
    ratios = [(a - r) / shape.steps / b for a, r, b in zip(seconds[case], read, base, strict=True)]
    return {"price": quantiles(ratios)[1], "price_of": str(first)}


@contextmanager
def _products(part: Part) -> Iterator[None]:
    """The precision of float32 products on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if part.tf32 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
