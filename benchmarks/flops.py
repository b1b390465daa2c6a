"""Floating-point operations of a meta-step: those that run, counted from shapes, and those of the cost model.

Two operations per multiply-add of a matrix product; what is not a product is not counted. docs/benchmarks.md has the
model as a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shapes import Shape
from gradmem_kernels import backend as backends
from gradmem_kernels.vendor import attention as vendor

__all__ = ["PARTS", "executed", "model"]

#: What the counts are split into: the linear layers, attention, and the head with its logits.
PARTS = ("linear", "attention", "head")

Flops = Mapping[str, float]

#: Where the two factors stand among the arguments of a product.
FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}

#: Products of an attention kernel (docs/attention.md): over all pairs of rows, over those with one of ``grad_rows`` and
#: over those with one of ``tangent_rows``.
ATTENTION_PRODUCTS = {"forward": (2, 0, 0), "backward": (0, 5, 0), "dual_forward": (2, 0, 4),
                      "dual_backward": (0, 7, 8), "double_backward": (0, 5, 7)}


def model(shape: Shape, mode: str, *, trained: bool = True) -> dict[str, float]:
    """Operations of a meta-step of the library with ``recompute=mode``, by part.

    ``trained``: gradients go to all weights and the embeddings, otherwise to the memory alone.
    """
    write, read = _Pass(shape, shape.context_tokens), _Pass(shape, shape.query_tokens)
    once, each = write.step(mode, trained)
    first_order = read.first_order(trained)
    return {part: (once[part] if shape.steps else 0) + shape.steps * each[part] + first_order[part] for part in PARTS}


class _Pass:
    """The products of one pass of the decoder over the memory and ``tokens`` tokens behind it."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        self.layers, context = shape.layers, tokens - 1
        rows = shape.memory_tokens + context
        key = shape.width * shape.kv_heads // shape.heads
        self.qkv = 2 * shape.batch * context * shape.width * (shape.width + 2 * key)
        self.down = 2 * shape.batch * rows * shape.width * shape.intermediate
        self.layer = 2 * shape.batch * rows * shape.width * (2 * shape.width + 2 * key) + 3 * self.down
        # one product of queries and keys, causal; and of it what has the memory's rows on one side
        product = shape.batch * shape.width
        self.pairs, self.memory_pairs = product * rows**2, product * (rows**2 - context**2)
        self.head = 2 * shape.batch * tokens * shape.width * shape.vocabulary

    def first_order(self, trained: bool) -> Flops:
        """Forward pass and backward pass; the head's logits are computed again for its weight's gradient."""
        return {"linear": (3 if trained else 2) * self.layers * self.layer,
                "attention": (2 + 5) * self.layers * self.pairs, "head": (4 if trained else 2) * self.head}

    def step(self, mode: str, trained: bool) -> tuple[Flops, Flops]:
        """What a WRITE and its outer backward cost once, and for each inner step."""
        passes = 2 + {"none": 2, "step": 4, "layer": 6}[mode] + 2 * trained
        linear = passes * self.layers * self.layer
        # the first layer reads projected context rows
        linear -= passes * self.qkv
        if mode == "layer":
            # a checkpoint stops before the last product, whose result nobody reads
            linear -= 2 * self.layers * self.down
        once = {"linear": (3 if trained else 1) * self.qkv, "attention": 0, "head": 0}
        every, first, first_memory = _attention(mode, trained)
        attention = ((self.layers - 1) * every + first) * self.pairs + first_memory * self.memory_pairs
        head = 2 + (3 if mode == "none" else 4) + 2 * trained
        return once, {"linear": linear, "attention": attention, "head": head * self.head}


def _attention(mode: str, trained: bool) -> tuple[int, int, int]:
    """Products of attention in an inner step: of every layer but the first; of the first with all pairs, and with those
    that have a row of the memory on one side."""
    write = 2 + 5
    if mode == "none":
        every = write + 12 + 5
        return (every, every, 0) if trained else (every, 2, every - 2)
    duals = 2 if mode == "layer" else 1
    every = write + 6 * duals + 15
    # in the first layer only the memory's rows have tangents, and where the context is frozen, gradients
    first = 2 + 2 * duals + (7 if trained else 0)
    return every, first, every - first


def executed(work: Callable[[], Any]) -> dict[str, float]:
    """Operations of the matrix products that ``work()`` runs, by part.

    Products outside of attention are those that reach PyTorch's dispatcher, with the sizes that they have there.
    Attention of the library is counted for each call of a kernel, after :data:`ATTENTION_PRODUCTS`: tiled kernels
    multiply more at the diagonal, and a vendor's show no products.
    """
    with _Count() as count, _watched(count):
        work()
    return {part: float(count.flops[part]) for part in PARTS}


class _Count(TorchDispatchMode):
    """Adds up products that are run; ``part`` is where they belong, or None inside a kernel that is counted whole."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.part: str | None = "linear"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # the name of a product in place ends in _
        first = FACTORS.get(func.overloadpacket.__name__.rstrip("_"))
        if first is not None and self.part is not None:
            a, b = args[first : first + 2]
            self.flops[self.part] += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))

    @contextmanager
    def inside(self, part: str | None) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


@contextmanager
def _watched(count: _Count) -> Iterator[None]:
    """Shows ``count`` every call of a kernel of attention and of the head."""
    select, choose = backends.select, vendor.choose
    watches = {"attention": _WatchedAttention, "linear_cross_entropy": _WatchedHead}

    def watched_select(op: str, *args: Any) -> Any:
        kernels = select(op, *args)
        return watches[op](kernels, count) if op in watches else kernels

    def watched_choose(*args: Any, **options: Any) -> Any:
        return _WatchedAttention(choose(*args, **options), count)

    with (mock.patch.object(backends, "select", watched_select), mock.patch.object(vendor, "choose", watched_choose)):
        yield


@dataclass(frozen=True)
class _WatchedHead:
    """The kernels of linear_cross_entropy, whose products belong to the head."""

    kernels: Any
    count: _Count

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.kernels, name)

        def run(*args: Any, **options: Any) -> Any:
            with self.count.inside("head"):
                return kernel(*args, **options)

        return run


@dataclass(frozen=True)
class _WatchedAttention:
    """The kernels of attention, each call of which counts as a whole."""

    kernels: Any
    count: _Count

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.kernels, name)

        def run(x: Sequence[Tensor], *args: Any, **options: Any) -> Any:
            if self.count.part is not None:  # not of a vendor's pair, which was counted already
                self.count.flops["attention"] += _attention_flops(name, x, args, options)
            with self.count.inside(None):
                return kernel(x, *args, **options)

        return run


def _attention_flops(kernel: str, x: Sequence[Tensor], args: Sequence[Any], options: Mapping[str, Any]) -> float:
    """Operations of one call of an attention kernel, whose arguments are those of gradmem_kernels.autograd.Kernels.

    Features that hide keys beside causality count for nothing.
    """
    known_zeros = [t for group in args[1:] if isinstance(group, tuple) for t in group if t is None or t is False]
    if known_zeros:
        raise ValueError(f"attention, {kernel}: expected every tangent and cotangent, got {len(known_zeros)} that are "
                         f"absent or not asked for, of which the table of products says nothing")
    batch, heads, queries, width = x[0].shape
    extents = (_pairs(queries, x[1].shape[2], options["causal"], rows)
               for rows in (None, options["grad_rows"], options["tangent_rows"]))
    pairs = sum(n * extent for n, extent in zip(ATTENTION_PRODUCTS[kernel], extents, strict=True))
    return 2 * batch * heads * width * pairs


def _pairs(queries: int, keys: int, causal: bool, rows: tuple[int, int] | None) -> float:
    """Pairs of a query and a key, causal half of them; with ``rows``, those with one of these rows on either side."""
    outside = 0 if rows is None else queries - (rows[1] - rows[0])
    return (queries * keys - outside**2) / (2 if causal else 1)
