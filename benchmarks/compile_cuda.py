"""``python -m benchmarks compile-report --cuda``: what the CUDA C++ kernels of this installation compiled to.

Reads registers, stack and shared memory of every kernel off the compiled module, without a GPU, and compares them with
the table committed for this CUDA toolkit (``benchmarks/results/``). What does not fit in registers is on the stack:
no kernel may have one.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS
from gradmem_kernels.native.build_info import build_info

__all__ = ["Line", "compare", "main", "parse", "path", "read_table", "write_table"]


@dataclass(frozen=True)
class Line:
    """What one kernel takes: registers and bytes of stack of a thread, and bytes of shared memory of a block, less what
    its launch asks for.
    """

    registers: int
    stack: int
    shared: int


_ARCHITECTURE = re.compile(r"^arch = (sm_\w+)$")
_FUNCTION = re.compile(r"^ *Function (\S+):$")
_USAGE = re.compile(r"\bREG:(\d+) STACK:(\d+) SHARED:(\d+)\b")


def parse(usage: str) -> dict[str, Line]:
    """Lines by mangled name and architecture, ``"name sm_80"``, from what ``cuobjdump -res-usage`` prints."""
    lines: dict[str, Line] = {}
    architecture = function = ""
    for text in usage.splitlines():
        if found := _ARCHITECTURE.match(text.strip()):
            architecture = found[1]
        elif found := _FUNCTION.match(text):
            function = found[1]
        elif found := _USAGE.search(text):
            lines[f"{function} {architecture}"] = Line(*map(int, found.groups()))
    if not lines or not architecture:
        raise ValueError(f"cuobjdump -res-usage: expected kernels, got {usage[:200]!r}")
    return lines


def readable(name: str) -> str:
    """A demangled name without namespaces, what the kernel returns and its parameters."""
    name, _, architecture = name.rpartition(" ")
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\b(\w+::)+", "", re.sub(r"\((\w+::)*(\w+)\)(\d)", r"\2 \3", name))
    return f"{re.sub(r'[(].*$', '', name)} {architecture}"


def measure(*modules: Path) -> dict[str, Line]:
    """Of every kernel of compiled modules, for every architecture."""
    lines: dict[str, Line] = {}
    for module in modules:
        lines |= parse(subprocess.run([_cuobjdump(), "-res-usage", module], capture_output=True, text=True,
                                      check=True).stdout)
    names = subprocess.run(["c++filt"], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    found = dict(zip(map(readable, names.splitlines()), lines.values(), strict=True))
    if len(found) != len(lines):
        raise ValueError("two kernels have one readable name")
    return dict(sorted(found.items()))


def _cuobjdump() -> str:
    """That of PATH, or the one that Triton's wheel carries."""
    spec = find_spec("triton")
    folders = [str(Path(folder) / "backends/nvidia/bin") for folder in spec.submodule_search_locations or ()] if (
        spec) else []
    found = shutil.which("cuobjdump") or next(filter(None, (shutil.which("cuobjdump", path=f) for f in folders)), None)
    if found is None:
        raise FileNotFoundError("cuobjdump: neither in PATH, nor is Triton installed, whose wheel has one")
    return found


def path(toolkit: str) -> Path:
    """The table of a CUDA toolkit."""
    return RESULTS / f"compile-report-cuda-{toolkit}.json"


def read_table(toolkit: str) -> dict[str, Line]:
    """The committed lines by name; none if this toolkit has no table."""
    file = path(toolkit)
    return {name: Line(**line) for name, line in json.loads(file.read_text()).items()} if file.exists() else {}


def write_table(toolkit: str, lines: Mapping[str, Line]) -> Path:
    """Replaces the table, a line of text for each line, so that differences are readable."""
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(asdict(line))}" for name, line in lines.items())
    path(toolkit).write_text(f"{{\n{text}\n}}\n")
    return path(toolkit)


def compare(lines: Mapping[str, Line], committed: Mapping[str, Line]) -> Iterator[str]:
    """What is wrong: which kernel, what was expected, what was got. Without a table only limits are looked at."""
    for name, line in lines.items():
        if line.stack > 0:
            yield f"{name}: stack: expected 0 bytes per thread, got {line.stack}"
        if committed and name not in committed:
            yield f"{name}: missing: expected in the table, which --update writes"
        elif committed:
            before, now = asdict(committed[name]), asdict(line)
            yield from (f"{name}: {field}: expected {before[field]}, got {now[field]}"
                        for field in now if before[field] != now[field])
    yield from (f"{name}: stale: in the table, but there is no such kernel" for name in committed if name not in lines)


def table(lines: Mapping[str, Line], toolkit: str) -> Table:
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
    lines = measure(*modules)
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
