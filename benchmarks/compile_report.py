"""``python -m benchmarks compile-report``: what the shipped Triton kernels compile to, without a GPU.

Builds every configuration for its architecture, reads registers, spills, shared memory and tensor-core instructions off
the binary, and compares them with the table committed for this version of Triton (``benchmarks/results/``). Compilation
is deterministic: a number that changed has a cause, in the kernels, a configuration or Triton.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compile_rows import CALLS, RowsBuild, rows_builds
from benchmarks.provenance import RESULTS
from gradmem_kernels.triton import attention
from gradmem_kernels.triton import attention_kernels as kernels
from gradmem_kernels.triton.attention_configs import CONFIGS, HEAD_DIMS, Config, Key
from gradmem_kernels.triton.common import INTERPRETED

__all__ = ["FEATURES", "LAUNCHES", "SHARED_LIMITS", "Build", "Feature", "Launch", "Line", "compare", "compile_build",
           "feature_builds", "main", "parse", "path", "read_table", "table_builds", "write_table"]

#: Bytes of shared memory that one program may take: the most of an A100 and of an H100.
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
#: Bytes of stack per thread that need no measurement, at the head dimensions that matter most.
STACK_LIMIT, STACK_HEAD_DIMS = 64, (64, 128)

#: The representative of each class of dtypes, and the precision of its products.
ELEMENTS = {"half": "bf16", "tf32": "fp32", "float32": "fp32"}
PRECISIONS = {"half": "ieee", "tf32": "tf32", "float32": "tf32x3"}

TANGENTS = ("p_qt", "p_kt", "p_vt")
#: Pointers that only a feature brings.
OPTIONAL = ("p_seqlens", "p_rows", "p_bias", "p_mask")
#: Pointers to something else than elements of the call's dtype.
POINTERS = {"p_lse": "*fp32", "p_mu": "*fp32", "p_stats": "*fp32", "p_seqlens": "*i32", "p_rows": "*i32",
            "p_mask": "*u8"}
#: Numbers and tuples of them; all others are i32.
TUPLES = {"s_bias": 4, "s_mask": 4, "grad_rows": 4, "tangent_rows": 4}
FLOATS = ("scale", "cap", "inverse")
#: Not divisible by 16 in a typical call, all other integers are.
ODD = ("Hq", "group")


class Launch(NamedTuple):
    """A kernel as gradmem_kernels/triton/attention.py launches it: the function, and the pointers that are ``None``."""

    function: Any
    absent: Collection[str] = ()


#: All of these are complete calls: every tangent and every cotangent is there.
LAUNCHES = {
    "forward": Launch(kernels.forward_kernel, (*TANGENTS, "p_ot", "p_mu")),
    "dual_forward": Launch(kernels.forward_kernel),
    "backward_queries": Launch(kernels.backward_queries_kernel, (*TANGENTS, "p_a", "p_dq")),
    "backward_keys": Launch(kernels.backward_keys_kernel, (*TANGENTS, "p_a", "p_dk", "p_dv")),
    "dual_backward_queries": Launch(kernels.backward_queries_kernel),
    "dual_backward_keys": Launch(kernels.backward_keys_kernel),
    "row_statistics": Launch(kernels.row_statistics_kernel),
}
#: Absent from a dual_backward_keys whose configuration says ``apart``.
APART = ("p_dkt", "p_dvt")
#: The launch of row_statistics_kernel; it has no configurations, since it has no loop.
STATISTICS = Config(own=attention._STATISTICS_ROWS, other=0, warps=4, stages=0)


class Feature(NamedTuple):
    """What a call may ask for beyond the table's: it must compile, whatever its registers."""

    name: str
    flags: Mapping[str, bool] = {}
    present: Collection[str] = ()
    absent: Collection[str] = ()
    head_dim: int = 64
    element: str = "bf16"
    #: The dual kernels hold the code of the others.
    kernels: Sequence[str] = ("dual_forward", "dual_backward_queries", "dual_backward_keys")


PLAIN = Feature("")
FEATURES = (
    Feature("window", {"WINDOW": True}),
    Feature("window of both sides", {"WINDOW": True, "CAUSAL": False}),
    Feature("softcap", {"CAP": True}),
    Feature("dropout", {"DROPOUT": True}),
    Feature("bias and mask", {"CAUSAL": False}, present=("p_bias", "p_mask")),
    Feature("seqlens", present=("p_seqlens",)),
    Feature("packed", present=("p_rows",)),
    Feature("rows with tangents", {"SOME_T": True}),
    Feature("known output", {"KNOWN": True}, absent=("p_a", "p_dqt", "p_dkt", "p_dvt")),
    Feature("tangent of v alone", absent=("p_qt", "p_kt")),
    Feature("head dimension 80", head_dim=80),
    Feature("float16", element="fp16"),
)


class Build(NamedTuple):
    """One kernel of attention to compile; those of other ops are :class:`benchmarks.compile_rows.RowsBuild`."""

    name: str
    kernel: str
    element: str
    head_dim: int
    architecture: str
    config: Config
    feature: Feature = PLAIN
    precision: str = "ieee"

    op = "attention"

    @property
    def listed(self) -> bool:
        """Whether it has a line in the table."""
        return not self.feature.name

    @property
    def stack_limit(self) -> int | None:
        """Bytes of stack per thread that it may have."""
        return STACK_LIMIT if self.head_dim in STACK_HEAD_DIMS and self.config.measured is None else None

    @property
    def size(self) -> int:
        """What takes longest to compile comes first."""
        return self.head_dim

    def source(self) -> ASTSource:
        return source(self)


@dataclass(frozen=True)
class Line:
    """One line of a table: a configuration, and what it compiles to."""

    own: int
    other: int
    warps: int
    stages: int
    apart: bool
    part: int | None
    registers: int
    #: Bytes of stack per thread, and the instructions that load from or store to it.
    stack: int
    spills: int
    #: Bytes of shared memory per program.
    shared: int
    #: Instructions in the program's text: of Hopper's warp groups, and of single warps.
    wgmma: int
    mma: int


def table_builds() -> list[Build | RowsBuild]:
    """What the table lists: every configuration of attention, the row statistics of each class, and the other ops."""
    builds: list[Build | RowsBuild] = [_build(key, config) for key, config in CONFIGS.items()]
    for dtype in ("half", "float32"):  # it has no products
        for head_dim in HEAD_DIMS:
            builds += [_build(Key("row_statistics", dtype, head_dim, arch), STATISTICS) for arch in SHARED_LIMITS]
    return [*builds, *rows_builds()]


def _build(key: Key, config: Config) -> Build:
    return Build(f"{key.kernel} {key.dtype} d{key.head_dim} {key.architecture}", key.kernel, ELEMENTS[key.dtype],
                 key.head_dim, key.architecture, config, precision=PRECISIONS[key.dtype])


def feature_builds() -> list[Build]:
    """Every feature, on the configurations that serve it."""
    builds = []
    for feature in FEATURES:
        head_class = next(d for d in HEAD_DIMS if feature.head_dim <= d)
        builds += [Build(f"{kernel}, {feature.name}, {arch}", kernel, feature.element, feature.head_dim, arch,
                         CONFIGS[Key(kernel, "half", head_class, arch)], feature)
                   for kernel in feature.kernels for arch in SHARED_LIMITS]
    return builds


def source(build: Build) -> ASTSource:
    """The kernel with the types, constants and alignments that a launch on a GPU would find."""
    signature: dict[str, str | tuple[str, ...]] = {}
    constants: dict[tuple[int, ...], Any] = {}
    alignments: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(LAUNCHES[build.kernel].function.params):
        kind = _type(build, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[i,] = _constants(build).get(parameter.name)
        elif not (parameter.do_not_specialize or parameter.name in (*FLOATS, *ODD)):
            places = [(i, k) for k in range(len(kind))] if isinstance(kind, tuple) else [(i,)]
            alignments |= {place: [["tt.divisibility", 16]] for place in places}
    return ASTSource(LAUNCHES[build.kernel].function, signature, constants, alignments)


def _type(build: Build, parameter: Any) -> str | tuple[str, ...]:
    name = parameter.name
    if parameter.is_constexpr or name in _absent(build):
        return "constexpr"
    if name.startswith("p_"):
        return POINTERS.get(name, f"*{build.element}")
    if name.startswith("s_") or name in TUPLES:
        return ("i32",) * TUPLES.get(name, 3)
    return "fp32" if name in FLOATS else "i32"


def _absent(build: Build) -> set[str]:
    """The pointers that are ``None``."""
    apart = APART if build.config.apart and build.kernel == "dual_backward_keys" else ()
    return {*LAUNCHES[build.kernel].absent, *OPTIONAL, *apart, *build.feature.absent} - {*build.feature.present}


def _constants(build: Build) -> dict[str, Any]:
    """The values of constants by name, those of other kernels too; a pointer that is not here is ``None``."""
    return {"DUAL": build.kernel.startswith("dual"), "KNOWN": False, "CAUSAL": True, "WINDOW": False, "CAP": False,
            "DROPOUT": False, "SOME_T": False, "D": build.head_dim, "DP": triton.next_power_of_2(build.head_dim),
            "ACC": tl.float32, "PRECISION": build.precision, "OWN": build.config.own,
            "OTHER": build.config.other, "PART": build.config.part or triton.next_power_of_2(build.head_dim),
            **build.feature.flags}


def _compile(build: Build | RowsBuild) -> Any:
    """Compiles, through Triton's own cache."""
    stages = {"num_stages": build.config.stages} if build.config.stages else {}
    target = GPUTarget("cuda", int(build.architecture.removeprefix("sm_")), 32)
    return triton.compile(build.source(), target=target, options={"num_warps": build.config.warps, **stages})


def compile_build(build: Build | RowsBuild) -> Line | None:
    """Compiles, and reads the binary; not that of a feature, since disassembling takes longer than Triton's cache."""
    config, compiled = build.config, _compile(build)
    if not build.listed:
        return None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, text = _cuobjdump("-res-usage", cubin), _cuobjdump("-sass", cubin)
    return Line(config.own, config.other, config.warps, config.stages, config.apart, config.part,
                shared=compiled.metadata.shared, **parse(usage, text))


def _cuobjdump(option: str, cubin: Path) -> str:
    return subprocess.run([triton.knobs.nvidia.cuobjdump.path, option, cubin], capture_output=True, text=True,
                          check=True).stdout


_USAGE = re.compile(r"\bREG:(\d+) STACK:(\d+)\b")
#: Address, predicate, opcode; what follows the opcode's first dot says how.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", re.MULTILINE)


def parse(usage: str, text: str) -> dict[str, int]:
    """The numbers of a :class:`Line` that the binary's resource usage and text hold."""
    found = _USAGE.findall(usage)
    if len(found) != 1:
        raise ValueError(f"cuobjdump -res-usage: expected REG and STACK of one function, got {usage!r}")
    opcodes = _INSTRUCTION.findall(text)
    if not opcodes:
        raise ValueError(f"cuobjdump -sass: expected instructions, got {text[:200]!r}")
    (registers, stack), = found
    return {"registers": int(registers), "stack": int(stack), "spills": opcodes.count("LDL") + opcodes.count("STL"),
            "wgmma": opcodes.count("HGMMA"), "mma": opcodes.count("HMMA")}


def path(version: str) -> Path:
    """The table of a version of Triton."""
    return RESULTS / f"compile-report-{version}.json"


def read_table(version: str) -> dict[str, Line]:
    """The committed lines by name; none if this version has no table yet."""
    file = path(version)
    return {name: Line(**line) for name, line in json.loads(file.read_text()).items()} if file.exists() else {}


def write_table(version: str, lines: Mapping[str, Line]) -> Path:
    """Replaces the table, a line of text for each line, so that differences are readable."""
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(asdict(line))}" for name, line in lines.items())
    path(version).write_text(f"{{\n{text}\n}}\n")
    return path(version)


def compare(builds: Sequence[Build | RowsBuild], lines: Mapping[str, Line],
            committed: Mapping[str, Line]) -> Iterator[str]:
    """What is wrong with ``lines``, the results of ``builds``: which, what was expected, what was got."""
    for build in builds:
        if build.name in lines:
            yield from _limits(build, lines[build.name])
            yield from _changes(build.name, lines[build.name], committed)
    for name in committed.keys() - {build.name for build in builds}:
        yield f"{name}: stale: in the table, but there is no such configuration"


def _limits(build: Build | RowsBuild, line: Line) -> Iterator[str]:
    limit = SHARED_LIMITS[build.architecture]
    if line.shared > limit:
        yield f"{build.name}: shared memory: expected at most {limit} bytes on {build.architecture}, got {line.shared}"
    if build.stack_limit is not None and line.stack > build.stack_limit:
        yield (f"{build.name}: stack: expected at most {build.stack_limit} bytes per thread in a configuration that "
               f"was not measured, got {line.stack}")


def _changes(name: str, line: Line, committed: Mapping[str, Line]) -> Iterator[str]:
    if name not in committed:
        yield f"{name}: missing: expected in the table, which --update writes"
        return
    before, now = asdict(committed[name]), asdict(line)
    yield from (f"{name}: {field}: expected {before[field]}, got {now[field]}"
                for field in now if before[field] != now[field])


def _compile_all(builds: Sequence[Build | RowsBuild], jobs: int, console: Console) -> tuple[dict[str, Line], list[str]]:
    """The lines by name in the order of ``builds``, and what did not compile."""
    lines: dict[str, Line | None] = {}
    failed = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool, Progress(console=console) as bar:
        task = bar.add_task(f"compiling with Triton {triton.__version__}", total=len(builds))
        # large ones first, so that none is left over at the end
        pending = {pool.submit(compile_build, build): build
                   for build in sorted(builds, key=lambda build: -build.size)}
        for future in concurrent.futures.as_completed(pending):
            build = pending[future]
            try:
                lines[build.name] = future.result()
            except Exception as error:  # whatever the compiler raises, about this build only
                failed.append(f"{build.name}: does not compile: {type(error).__name__}: {str(error).strip()[-500:]}")
            bar.advance(task)
    return {build.name: line for build in builds if (line := lines.get(build.name)) is not None}, failed


def table(lines: Mapping[str, Line]) -> Table:
    out = Table(title=f"compiled with Triton {triton.__version__}")
    out.add_column("kernel")
    for column in ("own x other", "warps", "stages", "registers", "stack", "spills", "shared KiB", "WGMMA", "MMA"):
        out.add_column(column, justify="right")
    for name, line in lines.items():
        tile = (f"{line.own}x{line.other}" if line.other else f"{line.own}") + (" apart" if line.apart else "")
        tile += f" part {line.part}" if line.part else ""
        numbers = (line.warps, line.stages, line.registers, line.stack, line.spills, f"{line.shared / 1024:.1f}",
                   line.wgmma, line.mma)
        out.add_row(name, tile, *map(str, numbers))
    return out


def main(arguments: Sequence[str]) -> int:
    """The command: 0 if everything compiles, keeps its limits and equals the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compile-report", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half precision at head dimension 64 on sm_90 only")
    parser.add_argument("--only", action="append", default=[], choices=("attention", *CALLS), metavar="OP",
                        help="the kernels of an op alone; the lines of others stay as they are")
    parser.add_argument("--update", action="store_true", help="replace the table of this version of Triton")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that compile (default 2)")
    args = parser.parse_args(arguments)
    if args.quick and args.update:
        parser.error("--update: --quick compiles a part of the table only; leave one of the two out")
    if args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {args.jobs}")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    console = Console()
    console.width = max(console.width, 130)  # a file or a pipe says 80
    return _report(args, console)


def _report(args: argparse.Namespace, console: Console) -> int:
    version = triton.__version__
    listed, features, committed = table_builds(), feature_builds(), read_table(version)
    if args.quick:
        listed, features = [build for build in listed if build.name.endswith(" half d64 sm_90")], []
        committed = {build.name: committed[build.name] for build in listed if build.name in committed}
    if args.only:
        listed, features = ([build for build in builds if build.op in args.only] for builds in (listed, features))
        others = {build.name for build in table_builds()} - {build.name for build in listed}
        committed = {name: line for name, line in committed.items() if name not in others}
    lines, problems = _compile_all([*listed, *features], args.jobs, console)
    console.print(table(lines))
    if args.update and not problems:
        kept = read_table(version)
        whole = {build.name: (kept | lines)[build.name] for build in table_builds() if build.name in kept | lines}
        console.print(f"written: {write_table(version, whole)}")
        committed = lines
    problems += compare(listed, lines, committed)
    for problem in problems:
        console.print(problem, style="red", markup=False, highlight=False)
    console.print(f"{len(lines)} configurations, {len(features)} builds of features, {len(problems)} problems")
    return 1 if problems else 0
