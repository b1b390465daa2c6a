"""transformers' models on these kernels: ``attn_implementation="gradmem"`` trains through ``create_graph=True``.

A model makes a mask, once for each kind of layer, and hands it to its layers' attention together with keywords of their
own. As with ``"eager"``, the mask alone says who sees whom. Where ``causal=``, ``window=`` and a row of keys can say it
too, the mask is a :class:`KeyMask`, and no ``[Q, K]`` matrix exists; see docs/transformers.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradmem_kernels.attention import attention
from gradmem_kernels.checks import Checker

__all__ = ["MINIMUM", "NAME", "KeyMask", "attend", "make_mask", "register"]

#: The name to select. One with "flash", "sdpa" or "flex" in it would be subject to transformers' checks of those.
NAME = "gradmem"
#: The first version whose mask functions are told lengths and offsets rather than ``cache_position``.
MINIMUM = "5.4"

#: Keywords of transformers that are no matter of attention's value, or have had their effect on the mask already.
IGNORED = frozenset({"cache_position", "max_length_k", "max_length_q", "num_items_in_batch", "output_hidden_states",
                     "output_router_logits", "position_ids", "seq_idx", "use_cache"})

EAGER = 'use attn_implementation="eager" for this model'
#: Keywords that would change the result, and what to do instead; any other unknown keyword is refused as well.
REFUSED = {
    "s_aux": f"attention sinks have no kernel; {EAGER}",
    "sinks": f"attention sinks have no kernel; {EAGER}",
    "position_bias": f"a learned bias would get no gradient; {EAGER}",
    "head_mask": f"a mask of heads has no kernel; {EAGER}",
    "layer_head_mask": f"a mask of heads has no kernel; {EAGER}",
    "cache": "paged caches are not served; generate with transformers' dynamic or static caches",
    "output_attentions": 'the probabilities are never held; look at them under attn_implementation="eager"',
}


class KeyMask(NamedTuple):
    """A causal mask that is no matrix: the last query sees up to the last key, as ``attention(causal=True)`` aligns.

    ``keys [B, K]`` bool: the keys that may be seen, ``None`` for all. ``window``: the latest keys a query sees, itself
    included, ``None`` for all.
    """

    keys: Tensor | None = None
    window: int | None = None

    @property
    def ndim(self) -> int:
        """None that transformers has a meaning for: its model passes on, unread, what generate() made ahead."""
        return 0

    def contiguous(self) -> KeyMask:
        """Itself: generate() calls it on the masks that it makes ahead for a static cache."""
        return self


def register() -> None:
    """Makes ``attn_implementation="gradmem"`` known to transformers; again and again does no harm.

    Raises:
        ImportError: if transformers is missing or older than :data:`MINIMUM`.
    """
    remedy = "install it with: pip install 'gradmem-kernels[transformers]'"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"register: expected transformers >= {MINIMUM}, got none; {remedy}") from error
    if _version(transformers.__version__) < _version(MINIMUM):
        raise ImportError(f"register: expected transformers >= {MINIMUM}, got {transformers.__version__}; {remedy}")
    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, make_mask)


def make_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
              mask_function: Any = None, attention_mask: Tensor | KeyMask | None = None, local_size: int | None = None,
              allow_is_causal_skip: bool = True, allow_is_bidirectional_skip: bool = False, config: Any = None,
              **kwargs: Any) -> Tensor | KeyMask | None:
    """The mask of one kind of layer, for :func:`attend`; the signature is that of transformers' mask functions.

    Args:
        batch_size, q_length, kv_length: sizes of the layer's queries and keys.
        q_offset, kv_offset: positions of the first query and the first key; a tensor of a static cache's.
        mask_function: transformers' predicate of (batch, head, query, key).
        attention_mask: ``[B, >= kv_offset]`` bool, the keys that are not padding, from position 0.
        local_size: the window or chunk.
        allow_is_causal_skip, allow_is_bidirectional_skip: ``mask_function`` is what its kind usually is.
        config: the model's configuration.

    Returns:
        ``None`` for plain causal attention; a :class:`KeyMask` for it with padding, a window, or a cache;
        ``[B, 1, 1, K]`` bool for attention to all that is not padding; ``[B, 1, Q, K]`` bool for anything else.
    """
    if isinstance(attention_mask, KeyMask):  # made ahead by generate()
        return attention_mask
    from transformers import masking_utils

    if allow_is_causal_skip and _is_causal_or_window(mask_function, local_size, config) \
            and not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length:
        keys = _visible_keys(attention_mask, kv_length, kv_offset)
        window = local_size if local_size is not None and local_size < kv_length else None
        plain = keys is None and window is None and (q_length == kv_length or q_length == 1)
        return None if plain else KeyMask(keys, window)
    if allow_is_bidirectional_skip and mask_function is masking_utils.bidirectional_mask_function:
        keys = _visible_keys(attention_mask, kv_length, kv_offset)
        if keys is None:  # not None, which a layer that calls itself causal would take for causal
            keys = torch.ones(1, kv_length, dtype=torch.bool, device=kwargs.get("device", "cpu"))
        return keys[:, None, None, :]
    whole: dict[str, Any] = {"q_offset": q_offset, "kv_offset": kv_offset, "mask_function": mask_function, **kwargs}
    return masking_utils.sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, config=config, **whole)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | KeyMask | None,
           dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
           sliding_window: int | None = None, softcap: float | None = None, cu_seq_lens_q: Tensor | None = None,
           cu_seq_lens_k: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """:func:`gradmem_kernels.attention` for a layer of a transformers model.

    Args:
        module: the layer; its ``is_causal`` counts where neither a mask nor ``is_causal`` says.
        query: ``[B, Hq, Q, d]``.
        key, value: ``[B, Hkv, K, d]``, not expanded.
        attention_mask: from :func:`make_mask`, or the caller's own ``[B, 1, Q, K]``, bool (True is visible) or floating
            (added to the scores; no gradient).
        dropout: of the probabilities, the seed from torch's CPU generator; layers pass 0 outside training.
        scaling: of the scores, ``d ** -0.5`` by default.
        is_causal: for calls without a mask.
        sliding_window: checked against the mask, which is what says it.
        softcap: of the scores.
        cu_seq_lens_q, cu_seq_lens_k: ``[N + 1]``, bounds of packed sequences (``B == 1``), besides the mask.
        kwargs: those in :data:`IGNORED` pass, and any that is None or False.

    Returns:
        ``[B, Q, Hq, d]`` and ``None``, for the probabilities.

    Raises:
        ArgumentError: for a keyword that would change the result and is not served, and for what attention refuses.
    """
    check = Checker(f'attn_implementation="{NAME}"')
    _refuse(check, kwargs)
    packed = cu_seq_lens_q is not None
    if not packed and cu_seq_lens_k is not None:
        check.fail("cu_seq_lens_k", "cu_seq_lens_q beside it", "none", "pass both, or neither")
    if isinstance(attention_mask, Tensor):
        seen = _explicit(check, attention_mask, query)
    elif attention_mask is None or isinstance(attention_mask, KeyMask):
        if attention_mask is None:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            attention_mask = _unmasked(check, query, key, causal, sliding_window, packed)
        elif is_causal is False:
            check.fail("is_causal", "None or True for a causal mask", False, "set config.is_causal = False instead")
        seen = _implied(attention_mask)
    else:
        check.fail("attention_mask", "a tensor or None", type(attention_mask).__name__)
    query, key, value = _autocast(query, key, value)
    out = attention(query, key, value, scale=scaling, softcap=softcap, dropout=dropout, cu_seqlens=cu_seq_lens_q,
                    cu_seqlens_k=cu_seq_lens_k, **seen)
    return out.transpose(1, 2).contiguous(), None


def _version(text: str) -> Any:
    from packaging.version import Version  # transformers needs it too

    return Version(text)


def _is_causal_or_window(mask_function: Any, local_size: int | None, config: Any) -> bool:
    """Whether a mask function that no overlay changed is causal, or causal with ``local_size`` as its window."""
    from transformers.masking_utils import causal_mask_function

    if local_size is None:
        return mask_function is causal_mask_function
    chunk, window = getattr(config, "attention_chunk_size", None), getattr(config, "sliding_window", None)
    return chunk is None and local_size == window  # chunks come with a local size too


def _visible_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """``[B, kv_length]`` bool, those of a layer's keys that are not padding; ``None`` if none is."""
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    keys = nn.functional.pad(attention_mask, (0, max(missing, 0)))[:, kv_offset:kv_offset + kv_length].bool()
    unread = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(keys)
    return None if not unread and bool(keys.all()) else keys


def _refuse(check: Checker, kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if name in IGNORED or value is None or value is False:
            continue
        got = f"{type(value).__name__} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        check.fail(name, "None", got, REFUSED.get(name, f"it may change the result and is not known here; {EAGER}"))


def _explicit(check: Checker, mask: Tensor, query: Tensor) -> dict[str, Any]:
    """Arguments of attention for a ``[B, 1, Q, K]`` mask, which says everything, causality included."""
    if mask.ndim != 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        check.fail("attention_mask", "[B, 1, Q, K], bool or floating", f"{mask.dtype} {list(mask.shape)}",
                   "give the model a [B, S] mask of padding, or a whole mask")
    if mask.dtype == torch.bool:
        return {"mask": mask}
    if mask.requires_grad:
        check.fail("attention_mask", "a mask that needs no gradient", "one with requires_grad=True", EAGER)
    return {"bias": mask.to(query.dtype)}


def _unmasked(check: Checker, query: Tensor, key: Tensor, causal: bool, window: int | None,
              packed: bool) -> KeyMask | None:
    """What no mask stands for, where that is certain: :func:`make_mask` leaves only plain cases to it."""
    queries, keys = query.shape[-2], key.shape[-2]
    remedy = "call the whole model, which makes the mask, rather than its layer"
    if window is not None and keys > window:
        check.fail("sliding_window", f"None or at least the {keys} keys of a call without a mask", window, remedy)
    if causal and 1 < queries != keys and not packed:
        check.fail("attention_mask", f"a mask for {queries} queries and {keys} keys", None,
                   f"without one, their alignment is open; {remedy}")
    return KeyMask() if causal else None


def _implied(mask: KeyMask | None) -> dict[str, Any]:
    if mask is None:
        return {}
    return {"causal": True, "window": mask.window, "mask": None if mask.keys is None else mask.keys[:, None, None, :]}


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in autocast's dtype where it is on, as its list has it for PyTorch's attention; float64 stays."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or any(tensor.dtype == torch.float64 for tensor in tensors):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
