"""``python -m benchmarks compile-report --cuda``: what the CUDA C++ kernels of this installation compiled to.

Reads registers, stack and shared memory of every kernel off the compiled module, without a GPU, and compares them with
the table committed for this CUDA toolkit (``benchmarks/results/``). What does not fit in registers is on the stack:
no kernel may have one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.provenance import RESULTS
from gradmem_kernels.native.build_info import build_info
from gradmem_kernels.native.kernel_attributes import KernelAttributes, kernel_attributes

__all__ = ["compare", "main", "path", "read_table", "write_table"]


def path(toolkit: str) -> Path:
    """The table of a CUDA toolkit."""
    return RESULTS / f"compile-report-cuda-{toolkit}.json"


def read_table(toolkit: str) -> dict[str, KernelAttributes]:
    """The committed lines by name; none if this toolkit has no table."""
    file = path(toolkit)
    table = json.loads(file.read_text()) if file.exists() else {}
    return {name: KernelAttributes(**line) for name, line in table.items()}


def write_table(toolkit: str, lines: Mapping[str, KernelAttributes]) -> Path:
    """Replaces the table, a line of text for each line, so that differences are readable."""
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(line._asdict())}" for name, line in lines.items())
    path(toolkit).write_text(f"{{\n{text}\n}}\n")
    return path(toolkit)


def compare(lines: Mapping[str, KernelAttributes], committed: Mapping[str, KernelAttributes]) -> Iterator[str]:
    """What is wrong: which kernel, what was expected, what was got. Without a table only limits are looked at."""
    for name, line in lines.items():
        if line.stack > 0:
            yield f"{name}: stack: expected 0 bytes per thread, got {line.stack}"
        if committed and name not in committed:
            yield f"{name}: missing: expected in the table, which --update writes"
        elif committed:
            before, now = committed[name]._asdict(), line._asdict()
            yield from (f"{name}: {field}: expected {before[field]}, got {now[field]}"
                        for field in now if before[field] != now[field])
    yield from (f"{name}: stale: in the table, but there is no such kernel" for name in committed if name not in lines)


def table(lines: Mapping[str, KernelAttributes], toolkit: str) -> Table:
    out = Table(title=f"compiled with CUDA {toolkit}")
    out.add_column("kernel")
    for column in ("registers", "stack", "shared bytes"):
        out.add_column(column, justify="right")
    for name, line in lines.items():
        out.add_row(name, str(line.registers), str(line.stack), str(line.shared))
    return out


def main(arguments: Sequence[str]) -> int:
    """The command: 0 if every kernel keeps its limits and equals the table, or there are no kernels here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compile-report --cuda", description=__doc__)
    parser.add_argument("--update", action="store_true", help="replace the table of this CUDA toolkit")
    parser.add_argument("--module", type=Path, nargs="+", metavar="PATH",
                        help="another module than the installed one, or what it is linked from")
    parser.add_argument("--toolkit", metavar="VERSION", help="what compiled that, such as 13.0.88")
    args = parser.parse_args(arguments)
    if (args.module is None) != (args.toolkit is None):
        parser.error("--module and --toolkit: expected both or none")
    console, info = Console(), build_info() or {}
    console.width = max(console.width, 130)  # a file or a pipe says 80
    spec = find_spec("gradmem_kernels.native._cuda")
    modules = args.module or ([Path(spec.origin)] if spec and spec.origin else [])
    toolkit = args.toolkit or info.get("cuda_toolkit")
    if not modules or toolkit is None:
        console.print("this installation has no compiled kernels for CUDA (gradmem doctor says why): nothing to report")
        return 0
    lines = kernel_attributes(*modules)
    console.print(table(lines, toolkit))
    committed = read_table(toolkit)
    if args.update and not any(compare(lines, {})):
        console.print(f"written: {write_table(toolkit, lines)}")
        committed = lines
    problems = list(compare(lines, committed))
    for problem in problems:
        console.print(problem, style="red", markup=False, highlight=False)
    console.print(f"{len(lines)} kernels, {len(problems)} problems" + ("" if committed else
                  f"; CUDA {toolkit} has no table, so that only limits were looked at"))
    return 1 if problems else 0
