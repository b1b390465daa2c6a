"""Softmax attention that can be differentiated twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradmem_kernels import backend as backends
from gradmem_kernels.autograd import Op, Tensors
from gradmem_kernels.checks import Checker, check_values
from gradmem_kernels.vendor import attention as vendor

__all__ = ["attention", "attention_dual"]

OP = Op("attention", x=("q", "k", "v"), aux=("seqlens", "cu_seqlens", "cu_seqlens_k", "mask", "bias"), y=("output",),
        keeps_y=True)

Rows = tuple[int, int]
INTEGERS = (torch.int32, torch.int64)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None,
              window: int | None = None, softcap: float | None = None, seqlens: Tensor | None = None,
              cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None, mask: Tensor | None = None,
              bias: Tensor | None = None, dropout: float = 0.0, dropout_seed: int | None = None,
              grad_rows: Rows | None = None, first_order: str | None = None, backend: str | None = None) -> Tensor:
    """``softmax(scale * q k^T + bias) v`` over visible keys, differentiable twice in ``q``, ``k`` and ``v``.

    Query ``i`` stands at ``p = i + Sk - Sq`` among the keys (aligned bottom-right). A key is visible to a query unless
    one of ``causal``, ``window``, ``seqlens``, ``cu_seqlens`` and ``mask`` hides it; what is hidden must be finite.

    Args:
        q: ``[B, Hq, Sq, d]``, float64, float32, bfloat16 or float16. Half precision is computed in float32.
        k, v: ``[B, Hkv, Sk, d]`` with ``Hq`` a multiple of ``Hkv``: query head ``h`` reads key head
            ``h // (Hq // Hkv)`` (grouped-query attention). Of q's dtype.
        causal: hides the keys ``j > p``.
        scale: factor of the scores, ``d ** -0.5`` by default.
        window: an integer ``>= 1``; hides the keys with ``|p - j| >= window``. With ``causal`` a query sees ``window``
            keys, itself included.
        softcap: a number ``c > 0``; scores ``s`` become ``c * tanh(s / c)``, before ``bias``.
        seqlens: ``[B]`` int32 or int64, for right padding: sample ``b`` has ``seqlens[b]`` valid keys and, if
            ``Sq == Sk``, as many valid queries. Checked to lie in ``0..Sk`` on CPU, elsewhere under
            ``GRADMEM_DEBUG=1``.
        cu_seqlens: ``[N + 1]`` int32 or int64, for ``N`` sequences one behind the other in one sample (``B = 1``, no
            ``seqlens``): queries ``cu_seqlens[n]:cu_seqlens[n + 1]`` see keys of sequence ``n`` only, to which they are
            aligned bottom-right. Starts with 0 and does not decrease; rows behind the last boundary belong to no
            sequence, and their output is 0. Checked where ``seqlens`` is.
        cu_seqlens_k: the boundaries of the keys; ``cu_seqlens`` by default, where ``Sq == Sk``.
        mask: bool ``[B | 1, Hq | 1, Sq | 1, Sk]``, true where a key is visible.
        bias: of the same shapes as ``mask``, of q's dtype or float32, added to the scores; ``-inf`` hides a key. Has no
            gradient.
        dropout: probability in ``[0, 1)`` that a weight of the softmax is dropped, the others being divided by
            ``1 - dropout``.
        dropout_seed: ``0..2**32 - 1``; the same seed drops the same weights, in every backend. ``None`` draws one from
            PyTorch's default CPU generator.
        grad_rows: ``(start, stop)``, ``0 <= start < stop <= Sq``, where ``Sq == Sk`` and without ``cu_seqlens``: rows
            of ``q``, ``k`` and ``v`` outside are constants, whose gradients are 0 and cost nothing, in every order.
        first_order: who runs the forward pass and its first derivative: ``"own"``, the backend's kernels, or one of
            PyTorch's fused kernels, ``"cpu_flash"``, ``"flash"``, ``"cudnn"``. ``None``: where no backend is asked for
            by name, the faster one that serves (docs/attention.md), else ``"own"``.
        backend: ``"reference"``, ``"triton"``, ``"native"``, or ``None`` for the automatic choice.

    Returns:
        ``[B, Hq, Sq, d]``, of q's dtype. Queries that see no key give 0, and gradients 0.

    Raises:
        ArgumentError: for an argument of another type, shape, dtype, device or range, a ``bias`` that requires grad,
            and arguments that exclude each other.
        BackendError: if ``backend`` is unknown, or it or ``first_order`` cannot serve.
        HigherOrderError: when a third derivative is taken.

    Source: Vaswani et al., Attention Is All You Need, arXiv 1706.03762; derivatives in docs/attention.md.
    """
    check = _check("attention", q, k, v)
    aux = _tensors(check, q, seqlens, cu_seqlens, cu_seqlens_k, mask, bias)
    options = _options(check, q, causal, scale, window, softcap, dropout, dropout_seed)
    _rows(check, "grad_rows", grad_rows, cu_seqlens)
    options |= {"grad_rows": grad_rows, "tangent_rows": grad_rows}
    if first_order not in (None, *vendor.CHOICES):
        check.fail("first_order", f"one of {', '.join(vendor.CHOICES)} or None", repr(first_order))
    kernels = backends.select("attention", backend, q, k, v, *aux)
    kernels = vendor.choose(first_order, kernels, (q, k, v), aux, options,
                            automatic=backend is None and backends.requested() is None)
    return OP(kernels, (q, k, v), aux, **options)[0]


def attention_dual(q: Tensor, k: Tensor, v: Tensor, q_t: Tensor | None, k_t: Tensor | None, v_t: Tensor | None, *,
                   causal: bool = False, scale: float | None = None, window: int | None = None,
                   softcap: float | None = None, seqlens: Tensor | None = None, cu_seqlens: Tensor | None = None,
                   cu_seqlens_k: Tensor | None = None, mask: Tensor | None = None, bias: Tensor | None = None,
                   dropout: float = 0.0, dropout_seed: int | None = None, grad_rows: Rows | None = None,
                   tangent_rows: Rows | None = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """:func:`attention` and its tangent along ``(q_t, k_t, v_t)``: returns ``o, o_t``, differentiable once.

    A tangent has the shape and dtype of its primal; ``None`` is a known zero, whose work is skipped. With
    ``tangent_rows=(start, stop)``, inside ``grad_rows`` and by default the same, tangents of the rows outside are taken
    as 0, whatever they hold, and receive gradient 0. Other arguments and errors as for :func:`attention`, save that
    there is no ``first_order`` to choose; a second derivative raises ``HigherOrderError``.
    """
    check = _check("attention_dual", q, k, v)
    for name, tangent, like in (("q_t", q_t, q), ("k_t", k_t, k), ("v_t", v_t, v)):
        check.tangent(name, tangent, like)
    aux = _tensors(check, q, seqlens, cu_seqlens, cu_seqlens_k, mask, bias)
    options = _options(check, q, causal, scale, window, softcap, dropout, dropout_seed)
    _rows(check, "grad_rows", grad_rows, cu_seqlens)
    _rows(check, "tangent_rows", tangent_rows, cu_seqlens, inside=grad_rows)
    kernels = backends.select("attention", backend, q, k, v, *aux)
    (o,), (o_t,) = OP.dual(kernels, (q, k, v), (q_t, k_t, v_t), aux, **options, grad_rows=grad_rows,
                           tangent_rows=tangent_rows or grad_rows)
    return o, o_t


def _check(op: str, q: Tensor, k: Tensor, v: Tensor) -> Checker:
    check = Checker(op)
    check.tensor("q", q, ("B", "Hq", "Sq", "d"))
    check.tensor("k", k, ("B", "Hkv", "Sk", "d"))
    check.tensor("v", v, ("B", "Hkv", "Sk", "d"))
    heads, kv_heads = check.sizes["Hq"], check.sizes["Hkv"]
    if kv_heads == 0 or heads % kv_heads:
        check.fail("q", f"a number of heads that is a multiple of k's, {kv_heads}", heads,
                   "grouped-query attention shares each key head among equally many query heads")
    return check


def _options(check: Checker, q: Tensor, causal: bool, scale: float | None, window: int | None, softcap: float | None,
             dropout: float, dropout_seed: int | None) -> dict[str, Any]:
    check.boolean("causal", causal)
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.shape[-1] else 1.0
    check.number("scale", scale)
    if window is not None:
        check.integer("window", window, minimum=1)
    if softcap is not None:
        check.number("softcap", softcap, above=0)
    check.number("dropout", dropout, minimum=0)
    if round(dropout * 2**32) >= 2**32:  # as kernels compare it
        check.fail("dropout", "a probability below 1", dropout)
    if dropout_seed is not None:
        check.integer("dropout_seed", dropout_seed, minimum=0, maximum=2**32 - 1)
    seed = 0
    if dropout > 0:
        seed = int(torch.randint(2**32, (), device="cpu")) if dropout_seed is None else dropout_seed
    return {"causal": causal, "scale": float(scale), "window": window,
            "softcap": None if softcap is None else float(softcap), "dropout": float(dropout), "seed": seed}


def _rows(check: Checker, argument: str, rows: Rows | None, cu_seqlens: Tensor | None,
          inside: Rows | None = None) -> None:
    if rows is None:
        return
    queries, keys = check.sizes["Sq"], check.sizes["Sk"]
    if not isinstance(rows, tuple) or len(rows) != 2 or any(type(i) is not int for i in rows):
        check.fail(argument, "two integers (start, stop) or None", rows)
    if queries != keys or cu_seqlens is not None:
        check.fail(argument, "as many queries as keys and no cu_seqlens",
                   f"{queries} queries, {keys} keys{'' if cu_seqlens is None else ' and cu_seqlens'}",
                   "pass None, and detach what is constant")
    start, stop = inside or (0, queries)
    if not start <= rows[0] < rows[1] <= stop:
        check.fail(argument, f"{start} <= start < stop <= {stop}{' (grad_rows)' if inside else ''}", rows,
                   "rows outside grad_rows are constants and have no tangent" if inside else "")


def _tensors(check: Checker, q: Tensor, seqlens: Tensor | None, cu_seqlens: Tensor | None,
             cu_seqlens_k: Tensor | None, mask: Tensor | None, bias: Tensor | None) -> Tensors:
    if seqlens is not None:
        check.tensor("seqlens", seqlens, ("B",), dtypes=INTEGERS)
        if check_values(seqlens) and seqlens.numel():
            low, high = int(seqlens.min()), int(seqlens.max())
            if low < 0 or high > check.sizes["Sk"]:
                check.fail("seqlens", f"values in 0..{check.sizes['Sk']} (the number of keys)", f"{low}..{high}")
    if cu_seqlens is not None:
        cu_seqlens_k = _packed(check, seqlens, cu_seqlens, cu_seqlens_k)
    elif cu_seqlens_k is not None:
        check.fail("cu_seqlens_k", "None without cu_seqlens", type(cu_seqlens_k).__name__,
                   "pass the boundaries of the queries as cu_seqlens")
    if mask is not None:
        _per_score(check, "mask", mask, (torch.bool,), "mask is true where a key is visible; what is added is bias")
    if bias is not None:
        _per_score(check, "bias", bias, tuple(dict.fromkeys((q.dtype, torch.float32))), "")
        if bias.requires_grad or forward_ad.unpack_dual(bias).tangent is not None:
            check.fail("bias", "a constant", "a tensor to be differentiated by",
                       "bias has no gradient: pass bias.detach(), or compute the attention in plain PyTorch")
    return seqlens, cu_seqlens, cu_seqlens_k, mask, bias


def _packed(check: Checker, seqlens: Tensor | None, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> Tensor:
    """Checks the boundaries; returns those of the keys."""
    batch, queries, keys = (check.sizes[name] for name in ("B", "Sq", "Sk"))
    if seqlens is not None:
        check.fail("seqlens", "None beside cu_seqlens", "both", "packed sequences have no padding between them")
    check.tensor("cu_seqlens", cu_seqlens, ("N+1",), dtypes=INTEGERS)
    if batch != 1:
        check.fail("cu_seqlens", "None for a batch of more than one, B=1", f"B={batch}",
                   "lay the sequences one behind the other along Sq and Sk")
    if cu_seqlens_k is None and queries != keys:
        check.fail("cu_seqlens_k", f"boundaries of the keys, since there are {queries} queries and {keys} keys", None)
    _boundaries(check, "cu_seqlens", cu_seqlens, queries)
    if cu_seqlens_k is None:
        return cu_seqlens
    check.tensor("cu_seqlens_k", cu_seqlens_k, ("N+1",), dtypes=INTEGERS)
    _boundaries(check, "cu_seqlens_k", cu_seqlens_k, keys)
    return cu_seqlens_k


def _boundaries(check: Checker, argument: str, cu: Tensor, length: int) -> None:
    if cu.numel() == 0:
        check.fail(argument, "at least one boundary, 0", "none")
    if check_values(cu):
        values = cu.tolist()
        if values[0] != 0 or values[-1] > length or values != sorted(values):
            check.fail(argument, f"boundaries from 0 that do not decrease, up to {length}", values)


def _per_score(check: Checker, argument: str, value: Tensor, dtypes: tuple[torch.dtype, ...], remedy: str) -> None:
    check.tensor(argument, value, ("...", "Sk"), dtypes=dtypes, remedy=remedy)
    full = [check.sizes[name] for name in ("B", "Hq", "Sq")]
    if value.dim() != 4 or any(size not in (1, most) for size, most in zip(value.shape, full, strict=False)):
        check.fail(argument, f"shape [{', '.join(f'{most} or 1' for most in full)}, {check.sizes['Sk']}]",
                   list(value.shape), "a dimension of size 1 is broadcast")
