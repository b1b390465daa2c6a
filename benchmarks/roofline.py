"""What this machine reaches at most, measured in the same run, and which part of it a row takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Row, clock_of

__all__ = ["COPIED", "Ceilings", "attach", "measure"]

#: Rows and columns of the matrices of the product, and bytes that the copy reads and writes; small ones, which reach
#: nothing, for a run that only shows that it works.
PRODUCT = {"cpu": 2048, "cuda": 8192, "quick": 128}
COPIED = {"cpu": 2**28, "cuda": 2**31, "quick": 2**16}
REPEATS = 7


class Ceilings(NamedTuple):
    """Operations and bytes a second."""

    flops: float
    bytes_s: float


@functools.cache
def measure(dtype: str, device: str, quick: bool = False) -> Ceilings:
    """The fastest of a few large products in this dtype, and of as many large copies.

    ``dtype``: a name of torch's, or ``tf32``: products of float32 that may round their factors.
    """
    kind = "quick" if quick else torch.device(device).type
    width, tensor = PRODUCT[kind], torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    clock, before = clock_of(device), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        # numbers like a model's: of equal ones a GPU takes less power, and its clock is higher
        a, b = (torch.randn(width, width, device=device).to(tensor) for _ in range(2))
        c = torch.empty_like(a)
        product = _fastest(lambda: torch.mm(a, b, out=c), clock)
    finally:
        torch.set_float32_matmul_precision(before)
    source = torch.ones(COPIED[kind] // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return Ceilings(2.0 * width**3 / product, COPIED[kind] / _fastest(lambda: target.copy_(source), clock))


def _fastest(work: Callable[[], Any], clock: Callable[[Callable[[], Any]], float]) -> float:
    work()
    return min(clock(work) for _ in range(REPEATS))


def attach(rows: Sequence[Row], device: str, quick: bool = False) -> list[Row]:
    """The rows with ceilings, and the part of them that is reached, where they say what they must spend and have a
    time."""
    return [_attached(row, device, quick) for row in rows]


def _attached(row: Row, device: str, quick: bool) -> Row:
    if row.median_ms is None or (row.must_flops is None and row.must_bytes is None):
        return row
    ceilings = measure(row.dtype, device, quick)
    least = max((row.must_flops or 0) / ceilings.flops, (row.must_bytes or 0) / ceilings.bytes_s)
    return replace(row, ceiling_flops=ceilings.flops, ceiling_bytes_s=ceilings.bytes_s,
                   roofline=1e3 * least / row.median_ms)
