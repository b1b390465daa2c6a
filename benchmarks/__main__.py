"""``python -m benchmarks <suite>``: measure, print a table, and with ``--store`` keep the rows."""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console

from benchmarks import attention, cross_entropy, footprint, memory, meta_step, ops
from benchmarks.harness import Options, Provenance, check_storable, store

SUITES = {"meta-step": meta_step, "memory": memory, "attention": attention, "cross-entropy": cross_entropy,
          "ops": ops, "footprint": footprint}
DEFAULT_REPEATS = 10


def main() -> int:
    if sys.argv[1:3] == ["compile-report", "--cuda"]:  # reads what was compiled already
        from benchmarks import compile_cuda

        return compile_cuda.main(sys.argv[3:])
    if sys.argv[1:2] == ["compile-report"]:  # times nothing: options of its own, and it needs Triton
        from benchmarks import compile_report

        return compile_report.main(sys.argv[2:])
    if sys.argv[1:2] == ["tune"]:  # likewise
        from benchmarks import tune

        return tune.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="See docs/benchmarks.md.",
                                     epilog="Other commands: compile-report --help, tune --help")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--quick", action="store_true", help="a tiny shape: shows that the suite runs, nothing else")
    parser.add_argument("--store", action="store_true", help="append the rows to benchmarks/results/<suite>.jsonl")
    parser.add_argument("--repeats", type=int, metavar="N",
                        help=f"rounds of the interleaved run (default {DEFAULT_REPEATS})")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--device", metavar="NAME",
                        help="cpu or cuda, for suites that run on both (default: cuda where there is one)")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="a part of a suite that has parts")
    args = parser.parse_args()
    if args.quick and args.store:
        parser.error("--store: the numbers of --quick mean nothing; leave one of the two out")
    for name, number in (("--repeats", args.repeats), ("--threads", args.threads)):
        if number is not None and number < 1:
            parser.error(f"{name}: expected at least 1, got {number}")
    if args.store:
        check_storable(Provenance.here())
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    suite, console = SUITES[args.suite], Console()
    options = Options(quick=args.quick, repeats=args.repeats or (2 if args.quick else DEFAULT_REPEATS),
                      device=_device(parser, args.suite, args.device), only=tuple(args.only))
    if args.only and not hasattr(suite, "PARTS"):
        parser.error(f"--only: {args.suite} has no parts")
    console.width = max(console.width, 150)  # a file or a pipe says 80
    with console.status(f"measuring {args.suite}; a large shape takes minutes"):
        report = suite.run(options)
    if report.rows:
        console.print(suite.table(report.rows))
    for reason in report.refused:
        console.print(f"refused, no numbers: {reason}", style="red")
    if args.store:
        console.print(f"stored in {store(report, args.suite)}")
    return 1 if report.refused else 0


def _device(parser: argparse.ArgumentParser, suite: str, name: str | None) -> str:
    """The device asked for, or the first choice of a suite."""
    devices = getattr(SUITES[suite], "DEVICES", ("cpu",))
    if name is None:
        return "cuda" if "cuda" in devices and torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in devices:
        parser.error(f"--device: {suite} runs on {' or '.join(devices)}, got {name}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: no CUDA device here")
    return name


if __name__ == "__main__":
    sys.exit(main())
