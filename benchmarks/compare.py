"""``--compare REV``: this tree and a git revision of it, measured in turn by the same benchmarks, and the ratios.

The revision gets a worktree of its own (build/compare), in which its CPU kernels are compiled, and this tree's
benchmarks: what differs is the library. Both run in processes of their own, round by round, every other round in
reverse order.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row, peak, quantiles
from benchmarks.meta_step_parts import REFUSED
from benchmarks.provenance import ROOT
from benchmarks.rows import key, load

__all__ = ["arguments", "main", "prepare", "ratios", "table"]

#: Rounds, and rounds of the interleaved run of each process in them.
ROUNDS, REPEATS = 5, 3
PACKAGES = ("gradmem_kernels", "gradmem")

Key = tuple[Any, ...]
#: Of each round, a side's rows by what they are about.
Rounds = Sequence[Mapping[Key, Row]]
Ratios = Mapping[Key, tuple[Row, Row, tuple[float, float, float]]]


def main(revision: str, argv: Sequence[str], rounds: int | None, console: Console) -> int:
    """Prints the table of ratios; 1 if no row was measured on both sides.

    Raises:
        SystemExit: if there is no such revision, or a process fails.
    """
    there, notes = prepare(revision)
    rounds = rounds or ROUNDS
    found: dict[Path, list[Mapping[Key, Row]]] = {ROOT: [], there: []}
    for tree in found:
        _check_packages(tree)
    with console.status("measuring"):
        for k in range(rounds):
            for tree in (ROOT, there) if k % 2 == 0 else (there, ROOT):
                found[tree].append({key(row): row for row in measure(tree, arguments(argv))})
    both = ratios(found[ROOT], found[there])
    console.print(table(both, revision))
    for note in notes:
        console.print(note, style="yellow", markup=False, highlight=False)
    for tree, other in ((ROOT, there), (there, ROOT)):
        for missing in set().union(*found[tree]) - set().union(*found[other]):
            side = "this tree" if tree == ROOT else revision
            console.print(f"only {side} has {' '.join(map(str, missing[1:5]))}", markup=False, highlight=False)
    return 0 if both else 1


def prepare(revision: str) -> tuple[Path, list[str]]:
    """A worktree of the revision with its kernels compiled and these benchmarks, and what readers have to know of it.

    Raises:
        SystemExit: if there is no such revision.
    """
    done = _run(["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"], ROOT)
    if done.returncode:
        raise SystemExit(f"--compare: expected a git revision, got {revision!r}")
    commit = done.stdout.strip()
    tree = ROOT / "build" / "compare" / commit[:12]
    if not tree.exists():
        added = _run(["git", "worktree", "add", "--detach", "--force", str(tree), commit], ROOT)
        if added.returncode:
            raise SystemExit(f"--compare: git worktree add failed: {added.stderr.strip()}")
    notes = [f"{revision} is {commit}, in {tree.relative_to(ROOT)}; git worktree remove --force takes it away"]
    notes += _compile(tree)
    shutil.rmtree(tree / "benchmarks", ignore_errors=True)
    shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
    return tree, notes


def _compile(tree: Path) -> list[str]:
    """What is to be said of compiled kernels: where a side has none, rows compare other things than they seem to."""
    problem = "it has no build of them"
    if (tree / "CMakeLists.txt").exists() and (tree / "setup.py").exists():
        # those for CUDA take minutes, and only a GPU runs them
        cuda = os.environ.get("GRADMEM_CUDA") or ("auto" if torch.cuda.is_available() else "off")
        built = _run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, GRADMEM_CUDA=cuda)
        problem = (built.stderr.strip().splitlines() or ["the build made none"])[-1]
    missing = [f"{side} has NO compiled CPU kernels ({why}): its ops are served by other backends"
               for side, at, why in (("the revision", tree, problem), ("this tree", ROOT, "see gradmem doctor"))
               if not list((at / "gradmem_kernels" / "native").glob("_cpu*.so"))]
    return missing or ["both sides have compiled CPU kernels"]


def _check_packages(tree: Path) -> None:
    """Raises ``SystemExit`` if a process in the tree would import another tree's packages."""
    code = f"import {', '.join(PACKAGES)}; print(*(m.__file__ for m in ({', '.join(PACKAGES)},)), sep='\\n')"
    done = _run([sys.executable, "-c", code], tree)
    files = done.stdout.split("\n")[: len(PACKAGES)] if done.returncode == 0 else []
    if len(files) < len(PACKAGES) or not all(Path(file).is_relative_to(tree) for file in files):
        raise SystemExit(f"--compare: expected the packages of {tree}, got {files or done.stderr[-500:]}")


def measure(tree: Path, arguments: Sequence[str]) -> list[Row]:
    """One process's rows.

    Raises:
        SystemExit: if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        done = _run([sys.executable, "-m", "benchmarks", *arguments, "--rows", str(rows)], tree)
        found = load(rows)
    # who refuses providers ends with an error too, having said so
    if not found or (done.returncode and REFUSED not in done.stdout):
        raise SystemExit(f"--compare: the benchmarks fail in {tree}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return found


def arguments(argv: Sequence[str]) -> list[str]:
    """The command's words without ``--compare`` and ``--repeats``, with the repeats of a process and with a path that
    does not depend on the folder."""
    left: list[str] = []
    words = iter([part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])])
    for word in words:
        if word in ("--compare", "--repeats"):
            next(words)
        else:
            left += [word, os.path.abspath(next(words))] if word == "--peer-path" else [word]
    return [*left, "--repeats", str(REPEATS)]


def ratios(here: Rounds, there: Rounds) -> Ratios:
    """For each row that both sides have: the last row of each, and quantiles of this tree's time over the other's
    within a round."""
    pairs: dict[Key, list[tuple[Row, Row]]] = {}
    for ours, theirs in zip(here, there, strict=True):
        for name in ours.keys() & theirs.keys():
            pairs.setdefault(name, []).append((ours[name], theirs[name]))
    found = {}
    for name, of in pairs.items():
        times = [a.median_ms / b.median_ms for a, b in of if a.median_ms is not None and b.median_ms is not None]
        if times or all(map(peak, of[-1])):
            found[name] = *of[-1], quantiles(times) if times else (float("nan"),) * 3
    return dict(sorted(found.items(), key=lambda item: str(item[0])))


def table(both: Ratios, revision: str) -> Table:
    """A line for each row; below 1, this tree is better."""
    out = Table(title=f"this tree over {revision}: time, quantiles of the ratios within a round, and peak memory")
    for column in ("step", "provider", "mode", "shape", "ms", f"ms, {revision}", "ratio", "20 %", "80 %", "memory"):
        out.add_column(column, justify="left" if column in ("step", "provider", "mode", "shape") else "right")
    for ours, theirs, (q20, median, q80) in both.values():
        shape = " ".join(f"{size}" for size in ours.shape.values())
        memory = f"{peak(ours) / peak(theirs):.3f}" if peak(ours) and peak(theirs) else "-"
        out.add_row(ours.step, ours.provider, ours.mode, shape,
                    *("-" if ms is None else f"{ms:.3f}" for ms in (ours.median_ms, theirs.median_ms)),
                    *("-" if math.isnan(r) else f"{r:.3f}" for r in (median, q20, q80)), memory)
    return out


def _run(command: Sequence[str], tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """In the tree, whose packages come before any that are installed."""
    path = os.pathsep.join([str(tree), str(tree / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True,
                          text=True, check=False)
