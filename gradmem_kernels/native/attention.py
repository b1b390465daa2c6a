"""Attention in C++, on CPUs and Hopper GPUs: the launch of its kernels. Derivation: docs/attention.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradmem_kernels.backend import BackendError
from gradmem_kernels.native.common import DTYPES, address, cuda, is_cuda, launch, view
from gradmem_kernels.native.common import refusal as refusal_of
from gradmem_kernels.operators.attention import Attention, Backward, Forward, Settings, packed_rows
from gradmem_kernels.operators.define import rows_dense

#: On a CPU: not PyTorch's fused attention (docs/attention.md has the measurements).
FASTEST_FIRST_ORDER = True
#: Head dimensions of the kernels for Hopper, and the most samples or heads of a launch.
HEAD_DIMS, MOST = (64, 128), 2**16 - 1

Tensors = Sequence[Tensor | None]


def refusal(q: Tensor | None = None, *others: Tensor | None) -> str | None:
    """Why these kernels cannot serve such tensors; ``None`` if they can."""
    reason = refusal_of(q)
    if reason is not None or q is None or not is_cuda(q):
        return reason
    if q.dtype != torch.bfloat16 or q.shape[-1] not in HEAD_DIMS:
        return f"its CUDA kernels take bfloat16 and head dimensions of 64 and 128, not {q.dtype} and {q.shape[-1]}"
    if max(q.shape[:2]) > MOST:
        return f"its CUDA kernels take at most {MOST} samples and heads, not {q.shape[0]} and {q.shape[1]}"
    if any(t is not None for t in others[3:]):  # behind k, v and seqlens
        return "its CUDA kernels have no packing, mask or bias"
    if capability(q) != (9, 0):
        return f"its CUDA kernels run on Hopper GPUs alone, of compute capability 9.0, not {capability(q)}"
    if not hasattr(cuda(), "attention_forward"):
        return "this installation was compiled without sm_90a (GRADMEM_CUDA_ARCHS)"
    return None


def capability(t: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(t.device)


def _launch_forward(tensors: Forward, settings: Settings, o: Tensor | None, o_t: Tensor | None, lse: Tensor | None,
                    mu: Tensor | None) -> None:
    known = o is None
    *x, known_o, known_lse = map(rows_dense, tensors)
    if is_cuda(tensors.q):
        x = _for_hopper(x, settings)
        if _without_elements(x):
            _fill(0, o, o_t, mu)
            _fill(math.inf, lse)
            return
        # kernels for Hopper compute what is known again
        o, lse = (torch.empty_like(o_t), torch.empty_like(known_lse)) if known else (o, lse)
        known = False
    elif known:
        o, lse = known_o, known_lse.contiguous()
    arguments, _alive = _arguments(x, settings)
    launch("attention_forward", tensors.q, {**arguments, "known": known, "o": view(o), "o_t": view(o_t),
                                            "lse": address(lse), "mu": address(mu)})


def _launch_backward(tensors: Backward, settings: Settings, *wanted: Tensor | None) -> None:
    *x, o, o_t, lse, mu, a, b = map(rows_dense, tensors[:12])
    lse, mu = (None if t is None else t.contiguous() for t in (lse, mu))
    results, sums = list(wanted), None
    if is_cuda(tensors.q):
        x = _for_hopper(x, settings)
        if _without_elements(x):
            _fill(0, *wanted)
            return
        a, b, results = _results_for_hopper(x, a, b, results)
        sums = 2, 1, o.shape[:3].numel()
    arguments, _alive = _arguments(x, settings)
    names = ("dq", "dk", "dv", "dq_t", "dk_t", "dv_t")
    launch("attention_backward", tensors.q, {
        **arguments, "o": view(o), "o_t": view(o_t), "a": view(a), "b": view(b), "lse": address(lse),
        "mu": address(mu), "grad_rows": settings.grad_rows or _all_rows(x),
        **dict(zip(names, map(view, results), strict=True))}, sums)


def _without_elements(x: Tensors) -> bool:
    """Whether there are no queries or no keys, for which nothing can be launched."""
    return x[0].numel() == 0 or x[1].numel() == 0


def _fill(value: float, *results: Tensor | None) -> None:
    for t in results:
        if t is not None:
            t.fill_(value)


def _for_hopper(x: Tensors, settings: Settings) -> list[Tensor | None]:
    """q, k, v and their tangents, none of which or all are there, as TMA can read them."""
    names = ("window", "softcap", "grad_rows", "tangent_rows")
    missing = [name for name in names if getattr(settings, name) is not None]
    missing += ["dropout"] * (settings.dropout > 0)
    if missing:
        raise BackendError(f"attention: backend: 'native' cannot serve this call: its CUDA kernels have no "
                           f"{' and '.join(missing)}; pass backend=None for the automatic choice")
    primals, tangents = x[:3], x[3:]
    if any(t is not None for t in tangents):
        tangents = [torch.zeros_like(t) if t_t is None else t_t for t, t_t in zip(primals, tangents, strict=True)]
    return [_aligned(t) for t in (*primals, *tangents)]


def _results_for_hopper(x: Tensors, a: Tensor | None, b: Tensor,
                        results: Tensors) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """The cotangents as TMA can read them, and places for all results of the kernels that will run: they compute those
    of q, k and v, or of their tangents, or, given a, of both."""
    wanted, wanted_t = (any(t is not None for t in part) for part in (results[:3], results[3:]))
    if wanted and (a is not None or wanted_t):
        a = torch.zeros_like(b) if a is None else a
        wanted = wanted_t = True
    queries, keys = any(t is not None for t in results[::3]), any(t is not None for t in (*results[1:3], *results[4:]))
    places = [t if t is not None or not (part and (keys if i else queries)) else torch.empty_like(like)
              for t, (i, like), part in zip(results, (*enumerate(x[:3]), *enumerate(x[:3])),
                                            (wanted,) * 3 + (wanted_t,) * 3, strict=True)]
    return _aligned(a), _aligned(b), places


def _aligned(t: Tensor | None) -> Tensor | None:
    """``t``, copied if its address or a stride is none of whole 16 bytes, or it repeats itself."""
    if t is None or (t.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in t.stride()[:3])):
        return t
    return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)


def _arguments(x: Tensors, settings: Settings) -> tuple[dict[str, Any], tuple[Tensor | None, ...]]:
    """What both kernels are told of q, k, v, their tangents and what is visible; and the tensors they will read."""
    q, k, *_ = x
    batch, heads, rows, d = q.shape
    keys = k.shape[2]
    seqlens = None if settings.seqlens is None else settings.seqlens.to(torch.int64).contiguous()
    packed = packed_rows(settings.cu_seqlens, settings.cu_seqlens_k, rows, torch.int64)
    mask, bias = (None if t is None else t.expand(batch, heads, rows, keys) for t in (settings.mask, settings.bias))
    names = ("q", "k", "v", "q_t", "k_t", "v_t")
    return {
        "dtype": DTYPES[q.dtype], "batch": batch, "heads": heads, "kv_heads": k.shape[1], "rows": rows, "keys": keys,
        "d": d, **dict(zip(names, map(view, x), strict=True)), "causal": settings.causal, "scale": settings.scale,
        "window": settings.window or 0, "softcap": settings.softcap or 0.0, "dropout": settings.dropout,
        "seed": settings.seed, "threshold": round(settings.dropout * 2**32), "seqlens": address(seqlens),
        "packed": address(packed), "mask": view(mask, 4), "bias": view(bias, 4),
        "bias_dtype": 0 if bias is None else DTYPES[bias.dtype],
        "tangent_rows": settings.tangent_rows or _all_rows(x)}, (seqlens, packed, mask, bias)


def _all_rows(x: Tensors) -> tuple[int, int]:
    """Of queries and keys, whichever has more."""
    return 0, max(x[0].shape[2], x[1].shape[2])


_operators = Attention("native", _launch_forward, _launch_backward)
forward, backward = _operators.forward, _operators.backward
dual_forward, dual_backward = _operators.dual_forward, _operators.dual_backward
double_backward = _operators.double_backward
