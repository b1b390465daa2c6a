"""Checks of attention on any device, against a formula in plain PyTorch; the tests beside this file call them.

Errors are distances to the formula in float64. A result may be at most twice as far off as the formula in its own
dtype, plus one rounding: the rule of tests/second_order.py, at sizes that are only affordable on a GPU.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from test_attention import kept_weights
from torch import Tensor

from benchmarks.attention_providers import Data, Functions, prepare
from gradmem_kernels import attention, attention_dual

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """Sizes and options of one call. ``seqlens`` and boundaries are tuples; ``mask`` and ``bias`` shapes of random
    tensors; ``layout`` is one of :data:`LAYOUTS`."""

    batch: int = 2
    heads: tuple[int, int] = (4, 2)
    lengths: tuple[int, int] = (200, 200)
    d: int = 64
    dtype: torch.dtype = torch.float32
    layout: str = "dense"
    options: Mapping[str, Any] = field(default_factory=dict)

    def data(self, device: str) -> Data:
        generator = torch.Generator(device).manual_seed(1)

        def random(heads: int, length: int) -> Tensor:
            t = torch.randn((self.batch, heads, length, self.d), generator=generator, device=device).to(self.dtype)
            return LAYOUTS[self.layout](t)

        queries, keys = ((heads, length) for heads, length in zip(self.heads, self.lengths, strict=True))
        sizes = (queries, keys, keys)
        return Data(tuple(random(*size) for size in sizes), tuple(random(*size) for size in sizes), random(*queries),
                    random(*queries))

    def tensors(self, device: str) -> dict[str, Any]:
        """The options as the ops take them."""
        generator = torch.Generator(device).manual_seed(2)
        out = dict(self.options)
        for name in ("seqlens", "cu_seqlens", "cu_seqlens_k"):
            if name in out:
                out[name] = torch.tensor(out[name], dtype=torch.int32, device=device)
        if "mask" in out:
            out["mask"] = torch.rand(out["mask"], generator=generator, device=device) < 0.7
        if "bias" in out:
            bias = torch.randn(out["bias"], generator=generator, device=device).to(self.dtype)
            out["bias"] = bias.masked_fill(torch.rand(bias.shape, generator=generator, device=device) < 0.1, -torch.inf)
        return out


def _sliced(t: Tensor) -> Tensor:
    """Every second element of memory; the others are NaN."""
    return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]


#: ``[B, S, H, d]`` in memory as projections give it; rows that are not dense.
LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t, "heads_inside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "sliced": _sliced}


def ours(call: Call, device: str, **how: Any) -> Functions:
    """``how``: backend, and who runs the first order."""
    options = call.tensors(device)
    of_op = {name: value for name, value in options.items() if name != "tangent_rows"}
    of_dual = {name: value for name, value in how.items() if name != "first_order"}
    return Functions(partial(attention, **of_op, **how), partial(attention_dual, **options, **of_dual))


def formula(call: Call, device: str) -> Functions:
    """The same in plain PyTorch, in the dtype of its inputs throughout."""
    options = call.tensors(device)
    shown, factors = visible(call, options, device), _factors(call, device)
    bias, softcap, scale = options.get("bias"), options.get("softcap"), options.get("scale") or call.d ** -0.5
    rows, tangent_rows = options.get("grad_rows"), options.get("tangent_rows") or options.get("grad_rows")

    def inside(t: Tensor, span: tuple[int, int]) -> Tensor:
        i = torch.arange(t.shape[2], device=device)[:, None]
        return (span[0] <= i) & (i < span[1])

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if rows is not None:
            q, k, v = (torch.where(inside(t, rows), t, t.detach()) for t in (q, k, v))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        scores = q @ k.mT * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if bias is not None:
            scores = scores + bias.masked_fill(bias == -torch.inf, 0).to(q.dtype)
        weights = scores.masked_fill(~shown, torch.finfo(q.dtype).min).softmax(-1) * shown
        return (weights if factors is None else weights * factors.to(q.dtype)) @ v

    def dual(q: Tensor, k: Tensor, v: Tensor, *x_t: Tensor) -> tuple[Tensor, Tensor]:
        if tangent_rows is not None:
            x_t = tuple(torch.where(inside(t, tangent_rows), t, 0) for t in x_t)
        o, o_t = torch.func.jvp(plain, (q, k, v), x_t)
        return o, o_t

    return Functions(plain, dual)


def visible(call: Call, options: Mapping[str, Any], device: str) -> Tensor:
    """True where a query sees a key, ``[B | 1, H | 1, Sq, Sk]``."""
    queries, keys = call.lengths
    i, j = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    distance, shown = i + (keys - queries) - j, torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if "cu_seqlens" in options:
        own, other = call.options["cu_seqlens"], call.options.get("cu_seqlens_k", call.options["cu_seqlens"])
        shown = torch.zeros_like(shown)
        for (r0, r1), (c0, c1) in zip(itertools.pairwise(own), itertools.pairwise(other), strict=True):
            shown[..., r0:r1, c0:c1] = True
            distance[r0:r1, c0:c1] = (i[r0:r1] - r1) - (j[c0:c1] - c1)
    if options.get("causal"):
        shown = shown & (distance >= 0)
    if "window" in options:
        shown = shown & (distance.abs() < options["window"])
    if "seqlens" in options:
        lengths = options["seqlens"].view(-1, 1, 1, 1)
        shown = shown & (j < lengths)
        if queries == keys:
            shown = shown & (i < lengths)
    if "mask" in options:
        shown = shown & options["mask"]
    if "bias" in options:
        shown = shown & (options["bias"] > -torch.inf)
    return shown


def _factors(call: Call, device: str) -> Tensor | None:
    dropout = call.options.get("dropout", 0.0)
    if dropout == 0:
        return None
    kept = kept_weights((call.batch, call.heads[0], *call.lengths), dropout, call.options["dropout_seed"])
    return torch.from_numpy(kept).to(device, torch.float64) / (1 - dropout)


def results(f: Functions, data: Data) -> Named:
    """Value, gradients, second derivatives, and those of the dual op."""
    found = prepare("step", f, data)() | prepare("double_backward", f, data)()
    return {name: t.detach() for name, t in found.items()}


def check_errors(call: Call, device: str, unit: float = 2**-23, **how: Any) -> None:
    """``unit`` is the rounding unit of the factors of matrix products. It matters for a single key, for which the
    formula's terms cancel exactly or are multiplied by 1, and nothing else rounds."""
    data = call.data(device)
    found = results(ours(call, device, **how), data)
    exact = results(formula(call, device), data.map(Tensor.double))
    plain = results(formula(call, device), data)
    slack = 4 * unit * max(float(t.norm()) for t in exact.values()) if call.lengths[1] == 1 else 0.0
    for name, truth in exact.items():
        t = found[name]
        assert t.dtype == call.dtype, f"{name} is {t.dtype}"
        error, of_plain = float((t - truth).norm()), float((plain[name] - truth).norm())
        of_rounding = float((truth.to(t.dtype) - truth).norm())
        assert error <= 2 * of_plain + of_rounding + slack, (  # written so that NaN fails
            f"{name} of {call}: error {error:.2e}, of plain PyTorch {of_plain:.2e}, of rounding {of_rounding:.2e}, "
            f"of {float(truth.norm()):.2e}")


def check_repeatable(call: Call, device: str, **how: Any) -> None:
    """The same call gives the same bits."""
    data, f = call.data(device), ours(call, device, **how)
    same_bits(results(f, data), results(f, data))


def check_batch(call: Call, device: str, **how: Any) -> None:
    """A sample's bits do not depend on the others in its batch."""
    assert not {"seqlens", "mask", "bias", "dropout"} & set(call.options), "options of the whole batch"
    data, one = call.data(device), replace(call, batch=1)
    together = results(ours(call, device, **how), data)
    for b in range(call.batch):
        alone = results(ours(one, device, **how), data.map(lambda t, b=b: t[b : b + 1].clone()))
        same_bits(alone, {name: t[b : b + 1] for name, t in together.items()})


def check_memory(call: Call, device: str, lengths: Sequence[int], peak: Callable[[Callable[[], Any]], int],
                 **how: Any) -> None:
    """The peak of everything grows in proportion to the length, from the first to the last of ``lengths``."""
    peaks = []
    for length in lengths:
        sized = replace(call, lengths=(length, length))
        data = sized.data(device)
        gc.collect()
        peaks.append(peak(lambda sized=sized, data=data: results(ours(sized, device, **how), data)))
    grown = dict(zip(lengths, peaks, strict=True))
    for (short, before), (long, after) in itertools.pairwise(grown.items()):
        assert after <= 1.1 * before * long / short, grown


def same_bits(one: Named, other: Named) -> None:
    assert one.keys() == other.keys()
    for name, t in one.items():
        assert torch.equal(t, other[name]), f"{name} differs"


#: Every option of attention, alone and together.
FEATURES: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "heads_alone": {"heads": (3, 3), "causal": True},
    "heads_share_one": {"heads": (6, 1)},
    "few_queries": {"lengths": (70, 200), "causal": True},
    "many_queries": {"lengths": (200, 70), "causal": True},
    "seqlens": {"batch": 3, "seqlens": (200, 0, 77), "causal": True},
    "seqlens_of_keys": {"batch": 3, "lengths": (90, 200), "seqlens": (200, 9, 77)},
    "packed": {"batch": 1, "cu_seqlens": (0, 33, 33, 161, 190), "causal": True},
    "packed_keys": {"batch": 1, "lengths": (150, 200), "cu_seqlens": (0, 50, 150), "cu_seqlens_k": (0, 20, 180),
                    "causal": True},
    "window": {"window": 40},
    "window_causal": {"window": 33, "causal": True},
    "mask": {"mask": (2, 1, 200, 200)},
    "mask_of_keys": {"mask": (1, 4, 1, 200), "causal": True},
    "bias": {"bias": (1, 4, 200, 200)},
    "softcap": {"softcap": 2.0, "causal": True},
    "dropout": {"dropout": 0.2, "dropout_seed": 2**32 - 5},
    "grad_rows": {"grad_rows": (40, 130), "causal": True},
    "tangent_rows": {"tangent_rows": (0, 20), "causal": True},
    "scale": {"scale": -0.2},
    "heads_inside": {"layout": "heads_inside", "causal": True},
    "sliced": {"layout": "sliced"},
    "everything": {"causal": True, "window": 90, "softcap": 3.0, "bias": (2, 1, 200, 200), "mask": (1, 4, 1, 200),
                   "dropout": 0.1, "dropout_seed": 3, "seqlens": (150, 200), "grad_rows": (10, 190),
                   "tangent_rows": (20, 60)},
}


def feature(name: str, **others: Any) -> Call:
    """A call of :data:`FEATURES`."""
    given = {**FEATURES[name], **others}
    sizes = {key: given.pop(key) for key in ("batch", "heads", "lengths", "layout", "d", "dtype") if key in given}
    return Call(**sizes, options=given)
