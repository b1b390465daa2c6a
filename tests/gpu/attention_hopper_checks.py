"""Attention for Hopper against float64 formulas, on a GPU or by its sources on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmem_kernels import backend as backends
from gradmem_kernels.reference import attention as reference

__all__ = ["CALLS", "EMPTY", "SOME", "check_call", "check_empty", "check_some"]

#: Blocks of 128 own rows, the last not full, tiles of 32 or 64 on the other side; ``[B, Hq, Hkv, Sq, Sk, d]``.
CALLS: dict[str, tuple[tuple[int, ...], bool, tuple[int, ...] | None]] = {
    "causal_grouped": ((1, 2, 1, 200, 200, 64), True, None),
    "padded_cross": ((2, 2, 2, 130, 70, 64), False, (70, 0)),
    "padded_causal": ((1, 1, 1, 150, 150, 128), True, (90,)),
    "few_queries": ((1, 2, 1, 70, 300, 128), True, None),
    "many_queries": ((1, 1, 1, 300, 70, 64), True, None),
    "full": ((1, 2, 2, 129, 129, 128), False, None),
    "one": ((2, 1, 1, 1, 1, 64), False, None)}

#: Which tangents there are, and which cotangents are asked for: of q, k, v and of their tangents.
SOME = {
    "one_tangent": ((0,), (True,) * 3, (True,) * 3), "values": ((2,), (True,) * 3, (False,) * 3),
    "only_q": ((0, 1, 2), (True, False, False), (False,) * 3), "only_k": ((1, 2), (False, True, False), (False,) * 3),
    "tangents_alone": ((0, 1, 2), (False,) * 3, (True, False, True)),
    "no_v_t": ((0, 1, 2), (True,) * 3, (True, True, False))}


#: Nothing to launch: no samples, no queries, no keys; ``[B, Hq, Hkv, Sq, Sk, d]``.
EMPTY = {"samples": (0, 2, 1, 5, 5, 64), "queries": (1, 2, 1, 0, 5, 64), "keys": (1, 2, 1, 5, 0, 128)}


def check_empty(name: str, device: str) -> None:
    """Queries that see no key give zeros, and so do gradients."""
    _check(EMPTY[name], False, None, (0, 1, 2), (True,) * 3, (True,) * 3, device)


def check_call(name: str, device: str) -> None:
    """All results of all kernels."""
    shape, causal, seqlens = CALLS[name]
    _check(shape, causal, seqlens, (0, 1, 2), (True,) * 3, (True,) * 3, device)


def check_some(name: str, device: str) -> None:
    _check((1, 2, 1, 130, 130, 64), True, None, *SOME[name], device)


def _check(shape: tuple[int, ...], causal: bool, seqlens: tuple[int, ...] | None, tangents: tuple[int, ...],
           needs: tuple[bool, ...], needs_t: tuple[bool, ...], device: str) -> None:
    batch, heads, kv_heads, rows, keys, d = shape
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, d, generator=generator).bfloat16().to(device)

    x = random(heads, rows), random(kv_heads, keys), random(kv_heads, keys)
    x_t = tuple(random(t.shape[1], t.shape[2]) if i in tangents else None for i, t in enumerate(x))
    a, b = random(heads, rows), random(heads, rows)
    aux = (None if seqlens is None else torch.tensor(seqlens, device=device), *(None,) * 4)
    options: dict[str, Any] = {
        "causal": causal, "scale": 0.7 * d**-0.5, "window": None, "softcap": None, "dropout": 0.0, "seed": 0,
        "grad_rows": None, "tangent_rows": None}
    ours = _results(backends.select("attention", "native", *x, *aux), x, aux, x_t, a, b, needs, needs_t, options)
    exact = _results(reference, *(_wide(t) for t in (x, aux, x_t, a, b)), needs, needs_t, options)
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        found = ours[name]
        assert torch.equal(found.isinf(), expected.isinf()), name
        finite = expected.isfinite()
        error = (found.double() - expected)[finite].norm()
        # of one key alone, most derivatives are 0 but for the rounding of o and o_t
        error /= expected[finite].norm().clamp(min=(1.0 if keys == 1 else 1e-3) * max(1, expected.numel()) ** 0.5)
        # results are rounded to bfloat16, and so are P and dS before they are multiplied
        assert error < (6e-3 if found.dtype == torch.bfloat16 else 1e-5), f"{name}: {error:.1e}"


def _results(kernels: Any, x: Any, aux: Any, x_t: Any, a: Tensor, b: Tensor, needs: tuple[bool, ...],
             needs_t: tuple[bool, ...], options: dict[str, Any]) -> dict[str, Tensor]:
    y, saved = kernels.forward(x, aux, **options)
    out = {"forward": (*y, *saved)}
    if any(needs):
        out["backward"] = kernels.backward(x, aux, y, saved, (b,), needs, **options)
        bars, y_t = kernels.double_backward(x, aux, x_t, y, saved, (b,), needs, **options)
        out["double_backward"] = (*bars, *y_t)
    y, y_t, saved = kernels.dual_forward(x, aux, x_t, **options)
    out["dual_forward"] = (*y, *y_t, *saved)
    for name, a_bar in (("dual_backward", (a,)), ("dual_backward without a", (None,))):
        bars = kernels.dual_backward(x, aux, x_t, y, y_t, saved, a_bar, (b,), needs, needs_t, **options)
        out[name] = (*bars[0], *bars[1])
    return {f"{name} {i}": t for name, results in out.items() for i, t in enumerate(results) if t is not None}


def _wide(t: Any) -> Any:
    if isinstance(t, tuple):
        return tuple(map(_wide, t))
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
