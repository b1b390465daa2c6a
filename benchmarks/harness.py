"""What every suite shares: the gate, interleaved timing, the result row and its provenance."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["RESULTS", "Options", "Process", "Provenance", "Report", "Result", "Row", "Samples", "check_storable",
           "cuda_clock", "gate", "in_fresh_process", "interleave", "interleave_prepared", "measure_process",
           "mebibytes", "old_objects_aside", "quantiles", "relative_errors", "store", "wall_clock"]

RESULTS = Path(__file__).parent / "results"

#: A provider may be this many times less exact than plain PyTorch in the same dtype, both against float64.
ERROR_FACTOR = 4.0
#: Environment variables that change the speed or the memory of a run.
ENVIRONMENT = ("GLIBC_TUNABLES", "GRADMEM_", "KMP_", "LD_PRELOAD", "MALLOC_", "MKL_", "OMP_", "PYTORCH_", "TRITON_")

#: A loss and the gradients of it, by name.
Result = tuple[Tensor, dict[str, Tensor]]
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


@dataclass(frozen=True)
class Provenance:
    """Where and when a number was measured, and with what."""

    device: str
    threads: int
    python: str
    torch: str
    triton: str | None
    #: Version of the GPU's driver, and of the CUDA that torch was built with; None on a CPU.
    driver: str | None
    commit: str | None
    modified: bool
    date: str
    environment: Mapping[str, str]
    cuda: str | None = None

    @classmethod
    def here(cls, device: str = "cpu") -> Provenance:
        """The provenance of this process. ``modified``: the tree differs from ``commit``, stored results aside.

        Where git tells nothing, the environment variable ``GRADMEM_COMMIT`` names the commit.
        """
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            triton = None
        gpu = torch.device(device).type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(device) if gpu else _cpu_model(), threads=torch.get_num_threads(),
            python=platform.python_version(), torch=torch.__version__, triton=triton,
            driver=_gpu_driver() if gpu else None, cuda=torch.version.cuda if gpu else None,
            commit=_git("rev-parse", "HEAD") or os.environ.get("GRADMEM_COMMIT") or None,
            modified=bool(_git("status", "--porcelain", "--", ".", f":(exclude){RESULTS.relative_to(_root())}")),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT)})


@dataclass(frozen=True)
class Row:
    """One result. ``None``: not measured by this suite. Times in milliseconds, quantiles 0.2 and 0.8 beside medians."""

    suite: str
    step: str
    provider: str
    mode: str
    dtype: str
    shape: Mapping[str, int]
    median_ms: float | None = None
    q20_ms: float | None = None
    q80_ms: float | None = None
    repeats: int | None = None
    #: Median of the ratios within each round of the interleaved run.
    ratio_to_eager: float | None = None
    tflops: float | None = None
    flop_formula: str | None = None
    #: Operations of the products of a step: after the cost model, and counted from those that run.
    model_flops: float | None = None
    executed_flops: float | None = None
    #: The bytes that the step has to move at least, over its time.
    gigabytes_per_second: float | None = None
    byte_formula: str | None = None
    peak_live_bytes: int | None = None
    peak_rss_bytes: int | None = None
    minor_faults: float | None = None
    #: Of the same after a model, from sizes alone.
    model_bytes: int | None = None
    #: The most that PyTorch's allocator had handed out at once on the GPU, less what lived before.
    peak_device_bytes: int | None = None
    #: Of the GPU's cache before each timed call: "flushed", or None on a CPU.
    l2: str | None = None
    #: Median of the ratios, within each round, to first order alone, and who ran that.
    price: float | None = None
    price_of: str | None = None
    #: The largest relative error of the loss and the gradients against float64, and plain PyTorch's own.
    error: float | None = None
    eager_error: float | None = None
    #: The shape on which errors were measured, where it is not ``shape``.
    checked_shape: Mapping[str, int] | None = None
    #: Why there are no numbers: not installed, refused by the provider, out of memory.
    unavailable: str | None = None
    provenance: Provenance = field(default_factory=Provenance.here)


@dataclass(frozen=True)
class Report:
    """What a suite hands back: rows worth storing, and what it refused to measure, with the reasons."""

    rows: Sequence[Row]
    refused: Sequence[str] = ()


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
def interleave(steps: Mapping[T, Callable[[], Any]], options: Options) -> dict[T, Samples]:
    """Times every step once per round, so that drift of the machine meets all of them; every other round runs
    backwards, so that none always follows the same neighbour."""
    for _ in range(options.warmup):
        for step in steps.values():
            step()
    samples = {name: Samples([], []) for name in steps}
    for k in range(options.repeats):
        for name in list(steps) if k % 2 == 0 else reversed(list(steps)):
            gc.collect()
            faults, start = _minor_faults(), time.perf_counter()
            steps[name]()
            samples[name].seconds.append(time.perf_counter() - start)
            samples[name].minor_faults.append(_minor_faults() - faults)
    return samples


@old_objects_aside()
def interleave_prepared(prepare: Mapping[T, Callable[[], Callable[[], Any]]], options: Options,
                        clock: Clock) -> dict[T, list[float]]:
    """As :func:`interleave`, for work that needs something before it which is not timed: ``prepare[name]()`` returns
    the work. It is prepared anew in each round, run once, timed once and freed, so that only one is in memory. What
    runs out of the GPU's memory is left out."""
    samples: dict[T, list[float]] = {name: [] for name in prepare}
    for k in range(options.repeats):
        for name in list(samples) if k % 2 == 0 else reversed(list(samples)):
            try:
                samples[name].append(_prepared_time(prepare[name], options.warmup, clock))
            except torch.OutOfMemoryError:
                del samples[name]
                torch.cuda.empty_cache()
    return samples


def _prepared_time(prepare: Callable[[], Callable[[], Any]], warmup: int, clock: Clock) -> float:
    work = prepare()
    for _ in range(warmup):
        work()
    gc.collect()
    return clock(work)


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


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 0.2, 0.5 and 0.8 quantiles."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def relative_errors(result: Result, exact: Result) -> dict[str, float]:
    """Of the loss and of each gradient: the norm of the difference over the norm of ``exact``."""
    loss, grads = result
    exact_loss, exact_grads = exact
    if grads.keys() != exact_grads.keys():
        raise ValueError(f"gradients: expected {sorted(exact_grads)}, got {sorted(grads)}")
    pairs = {"loss": (loss, exact_loss)} | {name: (grads[name], exact_grads[name]) for name in grads}
    return {name: float((a.double() - b).norm() / b.norm()) for name, (a, b) in pairs.items()}


def gate(name: str, errors: Mapping[str, float], eager: Mapping[str, float]) -> str | None:
    """Why the provider gets no time; ``None`` if it computes what plain PyTorch does, about as exactly."""
    eps = torch.finfo(torch.float32).eps
    bad = [f"{what}: {error:.1e}, plain PyTorch {eager[what]:.1e}" for what, error in errors.items()
           if not error <= ERROR_FACTOR * (eager[what] + eps)]  # written so that NaN is bad
    return f"{name}: wrong against float64: {'; '.join(bad[:4])}" if bad else None


def mebibytes(size: float | None) -> str:
    """For a table; a dash where nothing was measured."""
    return "-" if size is None else f"{size / 2**20:.2f}"


class Process(NamedTuple):
    """What a process of its own needs for a step."""

    peak_rss_bytes: int | None
    minor_faults: float


def measure_process(make: Callable[..., Callable[[], Any]], args: Sequence[Any], threads: int,
                    repeats: int = 2) -> Process:
    """Runs ``make(*args)()`` in this process, once and then ``repeats`` times: page faults per step after the first,
    and the highest resident set (``None`` where the system does not tell)."""
    torch.set_num_threads(threads)
    step = make(*args)
    step()
    faults = _minor_faults()
    for _ in range(repeats):
        step()
    return Process(_peak_rss(), (_minor_faults() - faults) / repeats)


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)`` in a process that has done nothing else."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def check_storable(provenance: Provenance) -> None:
    """Raises ``SystemExit`` if the commit does not tell what is measured."""
    if provenance.commit is None or provenance.modified:
        raise SystemExit("--store: expected a git checkout without uncommitted changes, so that the stored commit is "
                         "what was measured; commit first, or without git name it in GRADMEM_COMMIT")


def store(report: Report, suite: str) -> Path:
    """Appends the rows to the suite's results.

    Raises:
        SystemExit: if their commit does not tell what was measured.
    """
    for row in report.rows:
        check_storable(row.provenance)
    path = RESULTS / f"{suite}.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in report.rows)
    return path


def _root() -> Path:
    return RESULTS.parent.parent


def _git(*args: str) -> str | None:
    """What git says of the checkout; ``None`` without git, or outside one."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *args], cwd=_root(), capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu_driver() -> str | None:
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", version.read_text()) if version.exists() else None
    return found.group() if found else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _peak_rss() -> int | None:
    """``ru_maxrss`` is no use here: a spawned process inherits its parent's."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
