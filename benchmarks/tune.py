"""``python -m benchmarks tune``: measures configurations of the Triton attention kernels on the GPU of this machine.

Every candidate is checked against float64 before it is timed. The best are printed as entries of the table in
gradmem_kernels/triton/attention_configs.py, ready to paste, with the time of the configuration in use beside.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from benchmarks.attention_providers import Data, Shape, draw, head_by_head
from benchmarks.harness import Clock, cuda_clock, errors, gate
from gradmem_kernels import attention, attention_dual
from gradmem_kernels.triton.attention_configs import CONFIGS, HEAD_DIMS, KERNELS, Config, Key, choose, override

__all__ = ["Found", "candidates", "entry", "main", "prepare_kernel", "search", "spread"]

#: For each class of dtypes the one that is timed, and the precision of float32 products meanwhile.
DTYPES = {"half": (torch.bfloat16, "highest"), "tf32": (torch.float32, "high"), "float32": (torch.float32, "highest")}
#: Where candidates are checked: ragged, grouped, causal.
CHECKED = Shape(1, 4, 2, 321, 0)
#: Where they are timed.
TIMED = Shape(1, 16, 16, 8192, 0)

#: Score tiles and accumulators ``[own, d]`` that a kernel holds at once.
TILES = {"forward": (1, 1), "dual_forward": (2, 2), "backward_queries": (2, 1), "backward_keys": (2, 2),
         "dual_backward_queries": (4, 2), "dual_backward_keys": (4, 4)}
#: Registers of a thread, by that estimate, beyond which a candidate is not tried; the hardware has 255.
REGISTERS = 320
#: Of kernels that are not in the table and only prepare the work.
SAFE = Config(32, 32, 4, 1)


class Found(NamedTuple):
    """A candidate's median time, or why it has none."""

    config: Config
    seconds: float | None
    reason: str | None = None


def candidates(key: Key) -> list[Config]:
    """The configurations worth trying for a kernel: what may fit into its registers."""
    found = []
    parts = (None, 32) if key.head_dim > (32 if key.dtype == "float32" else 64) else (None,)
    for own, other, warps, stages in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)):
        for apart in (False, True) if key.kernel == "dual_backward_keys" else (False,):
            tiles, accumulators = TILES[key.kernel]
            held = tiles * own * other + accumulators // (2 if apart else 1) * own * key.head_dim
            if 16 <= held / (32 * warps) <= REGISTERS:
                found += [Config(own, other, warps, stages, apart, part) for part in parts]
    return found


def spread(configs: Sequence[Config], most: int | None) -> list[Config]:
    """At most so many of them, at even distances."""
    count = min(most or len(configs), len(configs))
    return [configs[i * len(configs) // count] for i in range(count)]


def prepare_kernel(kernel: str, data: Data, **options: Any) -> Callable[[], dict[str, Tensor]]:
    """Work that runs this kernel and as little else as there is: backward passes ask for what it computes alone."""
    options = {"causal": True, "backend": "triton", **options}
    x, x_t = ([t.detach().requires_grad_() for t in side] for side in (data.x, data.x_t))
    if kernel == "forward":
        return lambda: {"o": attention(*x, first_order="own", **options)}
    if kernel == "dual_forward":
        return lambda: dict(zip(("dual o", "dual o_t"), attention_dual(*x, *x_t, **options), strict=True))
    names = ("q",) if kernel.endswith("queries") else ("k", "v")
    by = {name: t for name, t in zip("qkv", x, strict=True) if name in names}
    if kernel.startswith("backward"):
        of, bars, what = [attention(*x, first_order="own", **options)], [data.b], "gradient of"
    else:
        of, bars, what = list(attention_dual(*x, *x_t, **options)), [data.a, data.b], "dual gradient of"
        by |= {f"{name}_t": t for name, t in zip("qkv", x_t, strict=True) if name in names}
    return lambda: {f"{what} {name}": g for name, g in zip(by, grad(of, list(by.values()), bars, retain_graph=True),
                                                           strict=True)}


def search(kernel: str, configs: Iterable[Config], check: Callable[[], str | None], work: Callable[[], Any],
           clock: Clock, repeats: int = 5, finalists: int = 3) -> list[Found]:
    """Checks and times each configuration; the ``finalists`` fastest again, interleaved. Fastest first, failures last.

    ``check()`` says what is wrong with the kernel's results, if anything.
    """
    found = []
    for config in configs:
        with override(**{kernel: config}):
            try:
                reason = check()
                seconds = None if reason else _median(clock, work, repeats)
            except Exception as error:  # what does not compile or does not fit is no candidate
                reason, seconds = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}", None
        found.append(Found(config, seconds, reason))
    timed = sorted((of for of in found if of.seconds is not None), key=lambda of: of.seconds or 0)
    best = timed[:finalists]
    samples: dict[Config, list[float]] = {of.config: [] for of in best}
    for _ in range(4 * repeats):
        for config, times in samples.items():
            with override(**{kernel: config}):
                times.append(clock(work))
    best = sorted((Found(config, statistics.median(times)) for config, times in samples.items()),
                  key=lambda of: of.seconds or 0)
    return best + timed[finalists:] + [of for of in found if of.seconds is None]


def entry(key: Key, config: Config, device: str, date: str) -> str:
    """A line of the table of configurations."""
    extra = (", apart=True" if config.apart else "") + (f", part={config.part}" if config.part else "")
    return (f'    Key("{key.kernel}", "{key.dtype}", {key.head_dim}, "{key.architecture}"): '
            f"Config({config.own}, {config.other}, {config.warps}, {config.stages}{extra}, "
            f'measured="{device}, {date}"),')


def report(key: Key, old: Config | None, found: Sequence[Found], device: str, date: str) -> Iterator[str]:
    """The entry of the fastest, and as comments the times of the others and of the configuration in use."""
    best = found[0]
    if best.seconds is None:
        yield f"    # {key}: no candidate works, the first because of {best.reason}"
        return
    yield entry(key, best.config, device, date)
    of_old = next((of for of in found if old is not None and _same(of.config, old)), None)
    if old is None:
        yield f"    # {1e3 * best.seconds:.3f} ms; none before"
    elif of_old is not None and of_old.seconds is not None:
        yield f"    # {1e3 * best.seconds:.3f} ms; before, {_text(old)}: {1e3 * of_old.seconds:.3f} ms"
    else:
        yield f"    # {1e3 * best.seconds:.3f} ms; before, {_text(old)}: {of_old.reason if of_old else 'not tried'}"
    failed = [of for of in found if of.seconds is None]
    yield f"    # {len(found) - len(failed)} of {len(found)} candidates work"
    for of in failed[:3]:
        yield f"    # {_text(of.config)}: {of.reason}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="by default all of them")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="by default all of them")
    parser.add_argument("--head-dim", action="append", type=int, choices=HEAD_DIMS, help="by default all of them")
    parser.add_argument("--length", type=int, default=TIMED.length, help="of the sequence timed (default %(default)s)")
    parser.add_argument("--max-candidates", type=int, metavar="N", help="of each kernel, spread over all of them")
    args = parser.parse_args(arguments)
    for name, number in (("--length", args.length), ("--max-candidates", args.max_candidates)):
        if number is not None and number < 1:
            parser.error(f"{name}: expected at least 1, got {number}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device here: configurations are measured on the GPU that they are for")
    # the module knows the architecture only where Triton runs
    architecture = importlib.import_module("gradmem_kernels.triton.common").architecture(torch.empty(0, device="cuda"))
    device, date = torch.cuda.get_device_name(), datetime.now(timezone.utc).date().isoformat()
    clock = cuda_clock("cuda")
    for dtype, head_dim in itertools.product(args.dtype or DTYPES, args.head_dim or HEAD_DIMS):
        for kernel in args.kernel or KERNELS:
            key = Key(kernel, dtype, head_dim, architecture)
            for line in tune(key, spread(candidates(key), args.max_candidates), clock, args.length, device, date):
                print(line, flush=True)
    return 0


def tune(key: Key, configs: Sequence[Config], clock: Clock, length: int, device: str, date: str) -> Iterator[str]:
    """Lines for the table, of one kernel."""
    dtype, products = DTYPES[key.dtype]
    torch.set_float32_matmul_precision(products)
    old = choose(key.kernel, key.dtype, key.head_dim, key.architecture) if key in CONFIGS else None
    small, large = replace(CHECKED, head_dim=key.head_dim), replace(TIMED, head_dim=key.head_dim, length=length)
    checked = draw(small, dtype, "cuda")
    exact = head_by_head(small, checked.map(Tensor.double))
    eager = errors(head_by_head(small, checked), exact)

    def check() -> str | None:
        return gate(key.kernel, errors(prepare_kernel(key.kernel, checked)(), exact), eager)

    if old is not None and not any(_same(config, old) for config in configs):
        configs = [old, *configs]
    # the kernels that only prepare the work run as the table says
    missing = {kernel: SAFE for kernel in KERNELS if key._replace(kernel=kernel) not in CONFIGS}
    with override(**missing):
        work = prepare_kernel(key.kernel, draw(large, dtype, "cuda"))
        found = search(key.kernel, configs, check, work, clock)
    yield from report(key, old, found, device, date)


def _median(clock: Clock, work: Callable[[], Any], repeats: int) -> float:
    work()
    return statistics.median(clock(work) for _ in range(repeats))


def _same(one: Config, other: Config) -> bool:
    return one._replace(measured=None) == other._replace(measured=None)


def _text(config: Config) -> str:
    return repr(config._replace(measured=None)).replace(", measured=None", "")


if __name__ == "__main__":
    sys.exit(main())
