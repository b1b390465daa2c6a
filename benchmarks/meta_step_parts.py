"""Parts of the meta-step suite that measure many shapes alike: the price of second order, long contexts, memory over K
and S. Most need a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table

from benchmarks import flops
from benchmarks.harness import (
    Clock,
    Options,
    Provenance,
    Report,
    Row,
    cuda_clock,
    gate,
    interleave_prepared,
    mebibytes,
    quantiles,
    relative_errors,
    wall_clock,
)
from benchmarks.live_memory import peak_live_bytes
from benchmarks.meta_step_providers import (
    EAGER,
    FIRST_ORDER,
    FLOP_FORMULA,
    GRAPHS,
    LLAMA_1B,
    PAPER,
    PROVIDERS,
    Provider,
    Shape,
    make_step,
)
from benchmarks.on_meta import triton_on_meta

__all__ = ["CPU", "CUDA", "Case", "Part", "measure", "tables"]


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
        tf32: whether products of float32 may round their factors to TF32, everyone's.
        counted: whether operations are counted.
    """

    cases: Sequence[Case]
    dtype: torch.dtype
    checked: Shape
    timed: bool = True
    rounds: int | None = None
    tf32: bool = False
    counted: bool = True


_LIBRARY = PROVIDERS[1:]
#: The width of Llama-3.2-1B, small enough for float64 and plain PyTorch.
_CHECKED = replace(LLAMA_1B, layers=2, vocabulary=4096, context_tokens=256)
_LONG = replace(LLAMA_1B, context_tokens=32768, steps=8)
_FLAT = [replace(LLAMA_1B, steps=k) for k in (1, 2, 4, 8, 32)] + [
    replace(LLAMA_1B, context_tokens=s) for s in (1024, 2048, 8192, 16384, 32768)]
#: Parts by name, the most telling first.
CUDA = {
    "price": Part([*(Case(provider, LLAMA_1B) for provider in _LIBRARY),
                   Case(_LIBRARY[1], replace(LLAMA_1B, steps=0)), *(Case(first, LLAMA_1B) for first in FIRST_ORDER)],
                  torch.bfloat16, _CHECKED),
    "paper": Part([Case(provider, PAPER) for provider in (*PROVIDERS, *GRAPHS)], torch.float32, PAPER, tf32=True),
    "long": Part([Case(provider, _LONG) for provider in _LIBRARY if provider.mode != "none"], torch.bfloat16, _CHECKED,
                 rounds=2),
    "flat": Part([Case(provider, shape) for shape in _FLAT for provider in PROVIDERS], torch.bfloat16, _CHECKED,
                 timed=False, counted=False),
}
CPU = {
    "long-context": Part([Case(provider, replace(PAPER, context_tokens=2048, batch=2)) for provider in PROVIDERS],
                         torch.float32, replace(PAPER, batch=2), timed=False),
}


class Found(NamedTuple):
    """Of a case: its error and plain PyTorch's, peak memory, or why it gets no numbers."""

    error: float | None = None
    eager_error: float | None = None
    peak: int | None = None
    unavailable: str | None = None
    wrong: str | None = None

    @property
    def usable(self) -> bool:
        return self.unavailable is None and self.wrong is None


def measure(name: str, part: Part, options: Options, clock: Clock | None = None) -> Report:
    """Every provider is checked, then the peak memory of every case is taken, then times, interleaved.

    ``clock``: by default the one of the device.
    """
    device = options.device
    with _products(part):
        checked = {provider: check(provider, part, device) for provider in dict.fromkeys(who for who, _ in part.cases)}
        found = {case: _peak(case, checked[case.provider], part, device) for case in part.cases}
        seconds: Mapping[Case, list[float]] = {}
        if part.timed:
            prepared = {case: partial(make_step, case.provider, case.shape, part.dtype, device=device)
                        for case, of in found.items() if of.usable}
            clock = clock or (cuda_clock(device) if torch.device(device).type == "cuda" else wall_clock)
            rounds = replace(options, repeats=min(options.repeats, part.rounds or options.repeats))
            seconds = interleave_prepared(prepared, rounds, clock)
            found |= {case: Found(unavailable="out of memory") for case in prepared.keys() - seconds.keys()}
    dtype = "tf32" if part.tf32 else str(part.dtype).removeprefix("torch.")
    base = Row(suite="meta-step", step=name, provider="", mode="", dtype=dtype, shape={},
               provenance=Provenance.here(device))
    return Report([_row(base, part, case, of, seconds) for case, of in found.items() if of.wrong is None],
                  list(dict.fromkeys(of.wrong for of in found.values() if of.wrong is not None)))


def check(provider: Provider, part: Part, device: str) -> Found:
    """The provider against float64 and plain PyTorch, of the same order, on ``part.checked``."""
    plain = EAGER if provider not in FIRST_ORDER else FIRST_ORDER[-1]

    def errors() -> Found:
        exact, eager, ours = (
            make_step(who, part.checked, dtype, device=device, rounded=part.dtype)()
            for who, dtype in ((plain, torch.float64), (plain, part.dtype), (provider, part.dtype)))
        ours, eager = (relative_errors(result, exact) for result in (ours, eager))
        return Found(max(ours.values()), max(eager.values()), wrong=gate(str(provider), ours, eager))

    return _attempt(provider, errors)


def _peak(case: Case, checked: Found, part: Part, device: str) -> Found:
    # a graph's memory was taken when it was captured
    if not checked.usable or case.provider in GRAPHS:
        return checked
    return _attempt(case.provider, lambda: checked._replace(
        peak=peak_bytes(make_step(case.provider, case.shape, part.dtype, device=device), device)))


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most that a step holds at once, weights and data aside."""
    if torch.device(device).type == "cpu":
        return peak_live_bytes(step)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _attempt(provider: Provider, work: Callable[[], Found]) -> Found:
    """What keeps plain PyTorch from running is its row's reason; an error of the library's own counts as wrong."""
    try:
        found = work()
    except torch.OutOfMemoryError:
        found = Found(unavailable="out of memory")
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        ours = provider.name.startswith("gradmem")
        found = Found(wrong=f"{provider}: {reason}") if ours else Found(unavailable=reason)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _row(base: Row, part: Part, case: Case, of: Found, seconds: Mapping[Case, list[float]]) -> Row:
    (provider, shape), cuda = case, base.provenance.cuda is not None
    row = replace(base, provider=provider.name, mode=provider.mode, shape=asdict(shape), error=of.error,
                  eager_error=of.eager_error, unavailable=of.unavailable,
                  checked_shape=None if part.checked == shape else asdict(part.checked),
                  **{"peak_device_bytes" if cuda else "peak_live_bytes": of.peak})
    if part.counted and of.usable:
        row = replace(row, **counts(case, part.dtype))
    if case not in seconds:
        return row
    times = seconds[case]
    q20, median, q80 = (1e3 * t for t in quantiles(times))
    row = replace(row, median_ms=median, q20_ms=q20, q80_ms=q80, repeats=len(times), l2="flushed" if cuda else None)
    if provider not in FIRST_ORDER:
        row = replace(row, tflops=shape.flops() / median * 1e-9, flop_formula=FLOP_FORMULA)
    eager = seconds.get(Case(EAGER, shape))
    if eager is not None:
        row = replace(row, ratio_to_eager=quantiles([a / b for a, b in zip(times, eager, strict=True)])[1])
    return replace(row, **price(case, seconds))


def counts(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Operations of a step: counted on the meta device, where the same Python runs without data, and the model's."""
    provider, shape = case
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


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each part."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.step, []).append(row)
    return [(_times if any(row.median_ms is not None for row in part) else _memory)(part) for part in parts.values()]


def _times(rows: Sequence[Row]) -> Table:
    first = rows[0]
    out = Table(title=f"{first.step}, {first.dtype}; {_model(first, 'steps')}", caption=_caption(rows))
    columns = ("provider", "mode", "K", "ms", "20 %", "80 %", "steps/s", "of eager", "price", "TFLOP/s", "model TFLOP",
               "executed TFLOP", "peak MiB", "error")
    for column in columns:
        out.add_column(column, justify="left" if column in columns[:2] else "right")
    for row in (row for row in rows if row.median_ms is not None):
        out.add_row(row.provider, row.mode, str(row.shape["steps"]),
                    *(f"{ms:.2f}" for ms in (row.median_ms, row.q20_ms, row.q80_ms)), f"{1e3 / row.median_ms:.2f}",
                    _number(row.ratio_to_eager, "x"), _number(row.price, "x"), _number(row.tflops),
                    *(_number(None if n is None else n * 1e-12) for n in (row.model_flops, row.executed_flops)),
                    mebibytes(_bytes(row)), "-" if row.error is None else f"{row.error:.0e}")
    return out


def _memory(rows: Sequence[Row]) -> Table:
    """One line for each provider, one column for each K and S."""
    first = rows[0]
    out = Table(title=f"{first.step}: peak memory in MiB, {first.dtype}; {_model(first, 'steps', 'context_tokens')}",
                caption=_caption(rows))
    shapes = dict.fromkeys((row.shape["steps"], row.shape["context_tokens"]) for row in rows)
    for column in ("provider", "mode", *(f"K={k} S={s}" for k, s in shapes)):
        out.add_column(column, justify="left" if column in ("provider", "mode") else "right")
    for provider in dict.fromkeys((row.provider, row.mode) for row in rows):
        line = {(row.shape["steps"], row.shape["context_tokens"]): _bytes(row) for row in rows
                if (row.provider, row.mode) == provider}
        out.add_row(*provider, *(mebibytes(line.get(shape)) for shape in shapes))
    return out


def _caption(rows: Sequence[Row]) -> str:
    missing: dict[tuple[str, str, str], list[str]] = {}
    for row in (row for row in rows if row.unavailable is not None):
        at = "K={steps} S={context_tokens}".format(**row.shape)
        missing.setdefault((row.provider, row.mode, row.unavailable), []).append(at)
    lines = [f"{provider} {mode} unavailable ({', '.join(at)}): {reason}"
             for (provider, mode, reason), at in missing.items()]
    checked = next((row.checked_shape for row in rows if row.checked_shape is not None), None)
    return "\n".join(lines + ([f"checked on {checked}"] if checked else []))


def _model(row: Row, *but: str) -> str:
    return ", ".join(f"{name} {size}" for name, size in row.shape.items() if name not in but)


def _bytes(row: Row) -> int | None:
    return row.peak_device_bytes if row.peak_live_bytes is None else row.peak_live_bytes


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.3g}{unit}"
