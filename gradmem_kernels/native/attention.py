"""Attention in C++: the launch of its kernels. Derivation: docs/attention.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradmem_kernels.native.common import DTYPES, address, cpu, view
from gradmem_kernels.native.common import refusal as refusal_of
from gradmem_kernels.operators.attention import Attention, Backward, Forward, Settings, packed_rows
from gradmem_kernels.operators.define import rows_dense

#: Not PyTorch's fused attention (docs/attention.md has the measurements).
FASTEST_FIRST_ORDER = True


def refusal(q: Tensor | None = None, *_: Tensor | None) -> str | None:
    """Why these kernels cannot serve such tensors; ``None`` if they can."""
    return refusal_of(q, cuda=False)


def _launch_forward(tensors: Forward, settings: Settings, o: Tensor | None, o_t: Tensor | None, lse: Tensor | None,
                    mu: Tensor | None) -> None:
    known = o is None
    *x, known_o, known_lse = map(rows_dense, tensors)
    if known:
        o, lse = known_o, known_lse.contiguous()
    arguments, _alive = _arguments(x, settings)
    cpu().attention_forward({**arguments, "known": known, "o": view(o), "o_t": view(o_t), "lse": address(lse),
                             "mu": address(mu)})


def _launch_backward(tensors: Backward, settings: Settings, *results: Tensor | None) -> None:
    *x, o, o_t, lse, mu, a, b = map(rows_dense, tensors[:12])
    lse, mu = (None if t is None else t.contiguous() for t in (lse, mu))
    arguments, _alive = _arguments(x, settings)
    names = ("dq", "dk", "dv", "dq_t", "dk_t", "dv_t")
    cpu().attention_backward({**arguments, "o": view(o), "o_t": view(o_t), "a": view(a), "b": view(b),
                              "lse": address(lse), "mu": address(mu), "grad_rows": settings.grad_rows or _all_rows(x),
                              **dict(zip(names, map(view, results), strict=True))})


def _arguments(x: Sequence[Tensor | None], settings: Settings) -> tuple[dict[str, Any], tuple[Tensor | None, ...]]:
    """What both kernels are told of q, k, v, their tangents and what is visible; and the tensors they will read."""
    q, k, *_ = x
    batch, heads, rows, d = q.shape
    keys = k.shape[2]
    seqlens = None if settings.seqlens is None else settings.seqlens.to(torch.int64).contiguous()
    packed = packed_rows(settings.cu_seqlens, settings.cu_seqlens_k, rows, torch.int64)
    mask, bias = (None if t is None else t.expand(batch, heads, rows, keys) for t in (settings.mask, settings.bias))
    names = ("q", "k", "v", "q_t", "k_t", "v_t")
    return {
        "dtype": DTYPES[q.dtype], "threads": torch.get_num_threads(), "batch": batch, "heads": heads,
        "kv_heads": k.shape[1], "rows": rows, "keys": keys, "d": d, **dict(zip(names, map(view, x), strict=True)),
        "causal": settings.causal, "scale": settings.scale, "window": settings.window or 0,
        "softcap": settings.softcap or 0.0, "dropout": settings.dropout, "seed": settings.seed,
        "threshold": round(settings.dropout * 2**32), "seqlens": address(seqlens), "packed": address(packed),
        "mask": view(mask, 4), "bias": view(bias, 4), "bias_dtype": 0 if bias is None else DTYPES[bias.dtype],
        "tangent_rows": settings.tangent_rows or _all_rows(x)}, (seqlens, packed, mask, bias)


def _all_rows(x: Sequence[Tensor | None]) -> tuple[int, int]:
    """Of queries and keys, whichever has more."""
    return 0, max(x[0].shape[2], x[1].shape[2])


_operators = Attention("native", _launch_forward, _launch_backward)
forward, backward = _operators.forward, _operators.backward
dual_forward, dual_backward = _operators.dual_forward, _operators.dual_backward
double_backward = _operators.double_backward
