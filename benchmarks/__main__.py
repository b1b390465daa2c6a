"""``python -m benchmarks <suite>``: measure, print a table, and with ``--store`` keep the rows."""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console

from benchmarks import memory, meta_step
from benchmarks.harness import Options, store

SUITES = {"meta-step": meta_step, "memory": memory}
DEFAULT_REPEATS = 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="See docs/benchmarks.md.")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--quick", action="store_true", help="a tiny shape: shows that the suite runs, nothing else")
    parser.add_argument("--store", action="store_true", help="append the rows to benchmarks/results/<suite>.jsonl")
    parser.add_argument("--repeats", type=int, metavar="N",
                        help=f"rounds of the interleaved run (default {DEFAULT_REPEATS})")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    args = parser.parse_args()
    if args.quick and args.store:
        parser.error("--store: the numbers of --quick mean nothing; leave one of the two out")
    for name, number in (("--repeats", args.repeats), ("--threads", args.threads)):
        if number is not None and number < 1:
            parser.error(f"{name}: expected at least 1, got {number}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    options = Options(quick=args.quick, repeats=args.repeats or (2 if args.quick else DEFAULT_REPEATS))
    suite, console = SUITES[args.suite], Console()
    console.width = max(console.width, 130)  # a file or a pipe says 80
    with console.status(f"measuring {args.suite}; a large shape takes minutes"):
        report = suite.run(options)
    if report.rows:
        console.print(suite.table(report.rows))
    for reason in report.refused:
        console.print(f"refused, no numbers: {reason}", style="red")
    if args.store:
        console.print(f"stored in {store(report, args.suite)}")
    return 1 if report.refused else 0


if __name__ == "__main__":
    sys.exit(main())
