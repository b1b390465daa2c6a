"""Softmax attention that can be differentiated twice."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_kernels import backend as backends
from gradmem_kernels.autograd import Op
from gradmem_kernels.checks import Checker, check_values

__all__ = ["attention", "attention_dual"]

OP = Op("attention", x=("q", "k", "v"), aux=("seqlens",), y=("output",), keeps_y=True)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None,
              seqlens: Tensor | None = None, backend: str | None = None) -> Tensor:
    """``softmax(scale * q k^T + mask) v``, differentiable twice in ``q``, ``k`` and ``v``.

    Args:
        q: ``[B, Hq, Sq, d]``, float64, float32, bfloat16 or float16. Half precision is computed in float32.
        k, v: ``[B, Hkv, Sk, d]`` with ``Hq`` a multiple of ``Hkv``: query head ``h`` reads key head
            ``h // (Hq // Hkv)`` (grouped-query attention). Of q's dtype.
        causal: query ``i`` sees the keys ``j <= i + Sk - Sq`` (aligned bottom-right).
        scale: factor of the scores, ``d ** -0.5`` by default.
        seqlens: ``[B]`` int32 or int64, for right padding: sample ``b`` has ``seqlens[b]`` valid keys and, if
            ``Sq == Sk``, as many valid queries; what is padded must be finite. Checked to lie in ``0..Sk`` on CPU,
            elsewhere under ``GRADMEM_DEBUG=1``.
        backend: ``"reference"``, ``"triton"``, ``"native"``, or ``None`` for the automatic choice.

    Returns:
        ``[B, Hq, Sq, d]``, of q's dtype. Queries that see no key give 0, and gradients 0.

    Raises:
        ArgumentError: for an argument of another type, shape, dtype or device.
        BackendError: if ``backend`` is unknown or cannot serve.
        HigherOrderError: when a third derivative is taken.

    Source: Vaswani et al., Attention Is All You Need, arXiv 1706.03762; derivatives in docs/attention.md.
    """
    scale = _check("attention", q, k, v, causal, scale, seqlens)[1]
    kernels = backends.select("attention", backend, q, k, v, seqlens)
    return OP(kernels, (q, k, v), (seqlens,), causal=causal, scale=scale)[0]


def attention_dual(q: Tensor, k: Tensor, v: Tensor, q_t: Tensor | None, k_t: Tensor | None, v_t: Tensor | None, *,
                   causal: bool = False, scale: float | None = None, seqlens: Tensor | None = None,
                   backend: str | None = None) -> tuple[Tensor, Tensor]:
    """:func:`attention` and its tangent along ``(q_t, k_t, v_t)``: returns ``o, o_t``, differentiable once.

    A tangent has the shape and dtype of its primal; ``None`` is a known zero, whose work is skipped. Other arguments
    and errors as for :func:`attention`; a second derivative raises ``HigherOrderError``.
    """
    check, scale = _check("attention_dual", q, k, v, causal, scale, seqlens)
    for name, tangent, like in (("q_t", q_t, q), ("k_t", k_t, k), ("v_t", v_t, v)):
        check.tangent(name, tangent, like)
    kernels = backends.select("attention", backend, q, k, v, seqlens)
    (o,), (o_t,) = OP.dual(kernels, (q, k, v), (q_t, k_t, v_t), (seqlens,), causal=causal, scale=scale)
    return o, o_t


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None,
           seqlens: Tensor | None) -> tuple[Checker, float]:
    check = Checker(op)
    check.tensor("q", q, ("B", "Hq", "Sq", "d"))
    check.tensor("k", k, ("B", "Hkv", "Sk", "d"))
    check.tensor("v", v, ("B", "Hkv", "Sk", "d"))
    heads, kv_heads = check.sizes["Hq"], check.sizes["Hkv"]
    if kv_heads == 0 or heads % kv_heads:
        check.fail("q", f"a number of heads that is a multiple of k's, {kv_heads}", heads,
                   "grouped-query attention shares each key head among equally many query heads")
    check.boolean("causal", causal)
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.shape[-1] else 1.0
    check.number("scale", scale)
    if seqlens is not None:
        check.tensor("seqlens", seqlens, ("B",), dtypes=(torch.int32, torch.int64))
        if check_values(seqlens) and seqlens.numel():
            low, high = int(seqlens.min()), int(seqlens.max())
            if low < 0 or high > check.sizes["Sk"]:
                check.fail("seqlens", f"values in 0..{check.sizes['Sk']} (the number of keys)", f"{low}..{high}")
    return check, float(scale)
