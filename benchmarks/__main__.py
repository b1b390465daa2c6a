"""``python -m benchmarks <suite>``: measure, print a table, and with ``--store`` keep the rows."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import compare, roofline
from benchmarks.harness import Options, Provenance, merged, store
from benchmarks.meta_step_parts import REFUSED
from benchmarks.provenance import RESULTS, check_storable
from benchmarks.rows import append
from benchmarks.suites import SUITES

DEFAULT_REPEATS = 10
#: Commands that time nothing of a suite, with options of their own, and the modules that they are.
COMMANDS = {"compile-report": "compile_report", "tune": "tune", "report": "report"}


def main() -> int:
    if sys.argv[1:3] == ["compile-report", "--cuda"]:  # reads what was compiled already
        return importlib.import_module("benchmarks.compile_cuda").main(sys.argv[3:])
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:  # not imported otherwise: some need Triton, or matplotlib
        return importlib.import_module(f"benchmarks.{COMMANDS[sys.argv[1]]}").main(sys.argv[2:])
    words = parser()
    args = words.parse_args()
    _check(words, args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console = Console()
    console.width = max(console.width, 150)  # a file or a pipe says 80
    if args.compare is not None:
        return compare.main(args.compare, sys.argv[1:], args.repeats, console)
    names = list(SUITES) if args.suite == "all" else [args.suite]
    failed = [name for name in names if _run(name, _options(words, name, args), args, console)]
    if args.suite == "all":
        failed += ["compile-report"] * _compile_report(args.quick, console)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """Of every suite's options."""
    out = argparse.ArgumentParser(prog="python -m benchmarks", description="See docs/benchmarks.md.",
                                  allow_abbrev=False,  # --compare finds its own words again
                                  epilog=f"Other commands, with --help of their own: {', '.join(COMMANDS)}")
    out.add_argument("suite", choices=[*SUITES, "all"], help="all: every suite in turn, and the compile report")
    out.add_argument("--quick", action="store_true", help="a tiny shape: shows that the suite runs, nothing else")
    out.add_argument("--store", action="store_true", help="append the rows to benchmarks/results/<suite>.jsonl")
    out.add_argument("--rows", metavar="FILE", type=Path, help="write the rows to this file, one JSON object a line")
    out.add_argument("--repeats", type=int, metavar="N",
                     help=f"rounds of the interleaved run (default {DEFAULT_REPEATS}; parts may have fewer)")
    out.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    out.add_argument("--device", metavar="NAME",
                     help="cpu or cuda, for suites that run on both (default: cuda where there is one)")
    out.add_argument("--only", action="append", default=[], metavar="PART", help="a part of a suite that has parts")
    out.add_argument("--peer-path", metavar="DIR", type=os.path.abspath,
                     help="a checkout of the paper's repository, whose model is measured too (meta-step)")
    out.add_argument("--compare", metavar="REV",
                     help="measure this tree and a git revision in turn, and print the ratios (docs/benchmarks.md)")
    return out


def _check(words: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.quick and args.store:
        words.error("--store: the numbers of --quick mean nothing; leave one of the two out")
    for name, number in (("--repeats", args.repeats), ("--threads", args.threads)):
        if number is not None and number < 1:
            words.error(f"{name}: expected at least 1, got {number}")
    if args.compare is not None and (args.store or args.rows or args.suite == "all"):
        words.error("--compare: expected one suite, and neither --store nor --rows: it prints ratios")
    if args.suite != "all":
        suite = SUITES[args.suite]
        if args.only and not hasattr(suite, "PARTS"):
            words.error(f"--only: {args.suite} has no parts")
        if args.peer_path and not hasattr(suite, "PEERS"):
            words.error(f"--peer-path: {args.suite} does not measure the paper's code; meta-step does")
    elif args.only:
        words.error("--only: all runs every part")
    if args.store:
        check_storable(Provenance.here())


def _options(words: argparse.ArgumentParser, name: str, args: argparse.Namespace) -> Options:
    return Options(quick=args.quick, repeats=args.repeats or (2 if args.quick else DEFAULT_REPEATS),
                   device=_device(words, name, args.device, args.suite == "all"), only=tuple(args.only),
                   peer_path=args.peer_path if hasattr(SUITES[name], "PEERS") else None)


def _run(name: str, options: Options, args: argparse.Namespace, console: Console) -> bool:
    """Measures a suite and says whether it refused anything."""
    suite = SUITES[name]
    reports = []
    with console.status(f"measuring {name}; a large shape takes minutes"):
        for report in suite.run(options):
            report = replace(report, rows=roofline.attach(report.rows, options.device, options.quick))
            # what is measured is kept, whatever comes next
            if args.store:
                store(report, name)
            if args.rows:
                append(args.rows, report.rows)
            reports.append(report)
    report = merged(reports)
    if report.rows:
        console.print(suite.table(report.rows))
    for reason in report.refused:
        console.print(f"{REFUSED}{reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    if args.store:
        console.print(f"stored in {RESULTS / name}.jsonl")
    return bool(report.refused)


def _compile_report(quick: bool, console: Console) -> bool:
    try:
        module = importlib.import_module("benchmarks.compile_report")
    except ImportError as error:
        console.print(f"compile-report: not run: {error}")
        return False
    return bool(module.main(["--quick"] if quick else []))


def _device(words: argparse.ArgumentParser, suite: str, name: str | None, anyway: bool) -> str:
    """The device asked for, or the first choice of a suite; ``anyway``: the suite's own where it does not have that."""
    devices: Sequence[str] = getattr(SUITES[suite], "DEVICES", ("cpu",))
    if name is None:
        return "cuda" if "cuda" in devices and torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in devices:
        if anyway and name.partition(":")[0] in ("cpu", "cuda"):
            return devices[0]
        words.error(f"--device: {suite} runs on {' or '.join(devices)}, got {name}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        words.error("--device: no CUDA device here")
    return name


if __name__ == "__main__":
    sys.exit(main())
