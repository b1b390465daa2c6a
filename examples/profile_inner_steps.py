"""Profile the inner steps of one meta-step: WRITE a context with K steps, READ from it, the outer backward pass.

    python examples/profile_inner_steps.py --steps 3 --trace runs/trace.json
    nsys profile --capture-range=cudaProfilerApi ... python examples/profile_inner_steps.py --tool cuda --device cuda

`--tool torch` (the default) is torch.profiler, and prints what each named range took; `cuda` leaves the profiling to
Nsight Systems or Nsight Compute and tells them where it begins and ends; `proton` is Triton's profiler.
docs/profiling.md says how to read what comes out.

Run on a CPU with torch.profiler; NOT RUN YET: the other two, and a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from gradmem import CausalLM, GradMem, GradMemConfig, LMConfig
from gradmem_kernels import profile_ranges

WARMUP = 2
#: Operators of the library have its namespace too; they are not ranges.
OPERATORS = ("gradmem::native_", "gradmem::triton_")


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, metavar="K", help="inner steps (default 2)")
    parser.add_argument("--recompute", default="step", choices=("none", "step", "layer"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=112, help="context tokens")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tool", default="torch", choices=("torch", "cuda", "proton"))
    parser.add_argument("--trace", type=Path, default=Path("runs/profile.json"),
                        help="where torch.profiler's timeline goes, or proton's result (default runs/profile.json)")
    return parser.parse_args(words)


def meta_step(args: argparse.Namespace) -> Callable[[], None]:
    """The step that is profiled, on random tokens."""
    torch.manual_seed(0)
    config = LMConfig(hidden_size=args.width, num_layers=args.layers, intermediate_size=4 * args.width)
    model = GradMem(CausalLM(config), GradMemConfig(steps=args.steps, recompute=args.recompute)).to(args.device)
    context, query = (torch.randint(config.vocab_size, (args.batch, length), device=args.device)
                      for length in (args.context, 8))

    def step() -> None:
        model.zero_grad()
        model(context, query, labels=query).loss.backward()

    return step


@contextlib.contextmanager
def profiled_by_torch(args: argparse.Namespace) -> Iterator[None]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device != "cpu")
    with profile(activities=activities) as profiler:
        yield
        _wait(args)
    args.trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(args.trace))
    table = Table("range", "calls", "host, ms", "device, ms", title="the library's ranges, those inside included")
    for event in sorted(profiler.key_averages(), key=lambda event: -event.cpu_time_total):
        if event.key.startswith("gradmem::") and not event.key.startswith(OPERATORS):
            table.add_row(event.key.removeprefix("gradmem::"), str(event.count), f"{event.cpu_time_total / 1e3:.2f}",
                          f"{event.device_time_total / 1e3:.2f}" if args.device != "cpu" else "-")
    console = Console()
    console.print(table)
    console.print(f"{args.trace}: open it in https://ui.perfetto.dev")


@contextlib.contextmanager
def profiled_from_outside(args: argparse.Namespace) -> Iterator[None]:
    if args.device == "cpu":
        raise SystemExit("--tool cuda: expected a CUDA device, got --device cpu; --tool torch profiles a CPU")
    torch.cuda.profiler.start()
    try:
        yield
        _wait(args)
    finally:
        torch.cuda.profiler.stop()


@contextlib.contextmanager
def profiled_by_proton(args: argparse.Namespace) -> Iterator[None]:
    if args.device == "cpu":
        raise SystemExit("--tool proton: expected a CUDA device, got --device cpu; --tool torch profiles a CPU")
    import triton.profiler as proton

    args.trace.parent.mkdir(parents=True, exist_ok=True)
    proton.start(str(args.trace.with_suffix("")), context="python", hook="triton")
    try:
        with proton.scope("meta-step"):
            yield
            _wait(args)
    finally:
        proton.finalize()


def _wait(args: argparse.Namespace) -> None:
    if args.device != "cpu":
        torch.cuda.synchronize(args.device)


TOOLS = {"torch": profiled_by_torch, "cuda": profiled_from_outside, "proton": profiled_by_proton}


def main(words: Sequence[str] | None = None) -> None:
    args = arguments(words)
    step = meta_step(args)
    for _ in range(WARMUP):  # kernels are compiled, and memory is taken
        step()
    _wait(args)
    # names are there for the step that is profiled alone, so that a filter by name finds it
    with profile_ranges(), TOOLS[args.tool](args):
        step()


if __name__ == "__main__":
    main()
