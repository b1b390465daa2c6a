"""What every suite shares: interleaved timing, the result row and its provenance."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import importlib
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.gate import Found, Result, attempt, compared, errors, gate, relative_errors, release
from benchmarks.live_memory import peak_live_bytes
from benchmarks.provenance import Provenance
from benchmarks.rows import Report, Row, mebibytes, merged, peak, store

__all__ = ["Clock", "Found", "Options", "Provenance", "Report", "Result", "Row", "Samples", "attempt", "clock_of",
           "compared", "cuda_clock", "errors", "gate", "in_fresh_process", "interleave_prepared", "mebibytes", "merged",
           "old_objects_aside", "peak", "peak_bytes", "peak_rss", "quantiles", "ratio", "relative_errors", "release",
           "require_parts", "store", "timed", "wall_clock"]

T = TypeVar("T")
#: Runs a piece of work once and returns its seconds.
Clock = Callable[[Callable[[], Any]], float]

#: Bytes written before each timed call on a GPU, so that none finds its inputs in the L2 cache (50 MB on an H100).
FLUSHED = 2**28


@dataclass(frozen=True)
class Options:
    """What the command line says. ``quick`` asks for a tiny shape: it shows that a suite runs, not how fast."""

    quick: bool
    repeats: int
    warmup: int = 1
    device: str = "cpu"
    #: Parts of the suite to run, by name; all of them if empty.
    only: tuple[str, ...] = ()
    #: A checkout of the paper's repository, whose model is measured too.
    peer_path: str | None = None


class Samples(NamedTuple):
    """One provider's part of an interleaved run, an entry per round."""

    seconds: list[float]
    minor_faults: list[int]


@contextlib.contextmanager
def old_objects_aside() -> Iterator[None]:
    """Inside, ``gc.collect()`` looks only at what was made there: the libraries' objects take a quarter of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@old_objects_aside()
def interleave_prepared(prepare: Mapping[T, Callable[[], Callable[[], Any]]], options: Options,
                        clock: Clock) -> dict[T, Samples]:
    """Times all work once per round, so that drift of the machine meets all of it; every other round runs backwards, so
    that none always follows the same neighbour.

    ``prepare[name]()`` does what is needed before and is not timed, and returns the work. It is prepared anew in each
    round, run once, timed once and freed, so that only one is in memory. What runs out of the GPU's memory is left out.
    """
    samples = {name: Samples([], []) for name in prepare}
    for k in range(options.repeats):
        for name in list(samples) if k % 2 == 0 else reversed(list(samples)):
            try:
                times = _prepared_time(prepare[name], options.warmup, clock)
            except torch.OutOfMemoryError:
                times = None
            if times is None:  # behind the exception, which holds what it was raised with
                del samples[name]
                release()
            else:
                samples[name].seconds.append(times[0])
                samples[name].minor_faults.append(times[1])
    return samples


def _prepared_time(prepare: Callable[[], Callable[[], Any]], warmup: int, clock: Clock) -> tuple[float, int]:
    work = prepare()
    for _ in range(warmup):
        work()
    gc.collect()
    faults = _minor_faults()
    seconds = clock(work)
    return seconds, _minor_faults() - faults


def clock_of(device: str) -> Clock:
    """The clock for work on this device."""
    return cuda_clock(device) if torch.device(device).type == "cuda" else wall_clock


def wall_clock(work: Callable[[], Any]) -> float:
    """For work on the CPU."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cuda_clock(device: str) -> Clock:
    """For work on a GPU: the time between two events on its current stream, the L2 cache flushed before.

    The flush also lets the CPU get ahead, so that a launch counts only where the GPU waits for it.
    """
    cache = torch.empty(FLUSHED, dtype=torch.int8, device=device)

    def clock(work: Callable[[], Any]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        cache.zero_()
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return 1e-3 * float(start.elapsed_time(stop))

    return clock


def timed(row: Row, samples: Samples, eager: Samples | None = None, *, flops: float | None = None,
          moved: float | None = None) -> Row:
    """The row with its times, page faults (of a CPU), the ratio to ``eager`` of the same rounds, and rates.

    Args:
        row: of the device that ``samples`` are of.
        samples: a provider's.
        eager: plain PyTorch's, where it ran.
        flops: operations that the work must spend.
        moved: bytes that it must move.
    """
    q20, median, q80 = (1e3 * t for t in quantiles(samples.seconds))
    cuda = row.provenance.cuda is not None
    return replace(
        row, median_ms=median, q20_ms=q20, q80_ms=q80, repeats=len(samples.seconds), l2="flushed" if cuda else None,
        minor_faults=None if cuda else quantiles(samples.minor_faults)[1], must_flops=flops, must_bytes=moved,
        ratio_to_eager=None if eager is None else ratio(samples.seconds, eager.seconds),
        tflops=None if flops is None else flops / median * 1e-9,
        gigabytes_per_second=None if moved is None else moved / median * 1e-6)


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return quantiles([a / b for a, b in zip(times, others, strict=True)])[1]


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 0.2, 0.5 and 0.8 quantiles."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """The most that ``work()`` holds at once beside what there was before: of live tensors on a CPU, handed out by the
    allocator on a GPU."""
    if torch.device(device).type == "cpu":
        return peak_live_bytes(work)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_rss(make: Callable[..., Callable[[], Any]], *args: Any) -> int | None:
    """The highest resident set of a fresh process that runs ``make(*args)()`` once, libraries included; ``None`` where
    the system does not tell. What is passed must be importable there."""
    return in_fresh_process(_run_once, make.__module__, make.__name__, args, torch.get_num_threads())


def _run_once(module: str, name: str, args: Sequence[Any], threads: int) -> int | None:
    torch.set_num_threads(threads)
    getattr(importlib.import_module(module), name)(*args)()
    return _peak_rss()


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)`` in a process that has imported the suites and done nothing else.

    It is forked from one that imported them, which takes milliseconds; that one has run no operation, and so has no
    threads, and its resident set is where the new one's begins.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.suites"])
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def require_parts(options: Options, known: Iterable[str]) -> None:
    """Raises ``SystemExit`` for a part that the suite does not have here."""
    if unknown := set(options.only) - set(known):
        raise SystemExit(f"--only: expected parts of {', '.join(known)}, got {', '.join(sorted(unknown))}")


def _minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _peak_rss() -> int | None:
    """``ru_maxrss`` is no use here: a spawned process inherits its parent's."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
