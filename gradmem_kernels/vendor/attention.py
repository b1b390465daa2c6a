"""First order of attention by PyTorch's fused kernels, second order by a backend of ours (docs/attention.md).

A vendor's forward and backward take the place of a backend's; its log-sum-exp is what the other kernels expect (natural
logarithm, ``[B, Hq, Sq]``), so the two pair freely. They serve full and causal square attention; the rest they refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmem_kernels.autograd import Flags, Kernels, Tensors
from gradmem_kernels.backend import BackendError
from gradmem_kernels.reference.common import is_wrapped

__all__ = ["CHOICES", "DEFAULTS", "Vendor", "automatic_choice", "choose"]

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Vendor:
    """One of PyTorch's fused attentions.

    ``forward(q, k, v, causal, scale) -> o, lse`` and ``backward(do, q, k, v, o, lse, causal, scale) -> dq, dk, dv``;
    ``refusal(q)`` says why it cannot serve such tensors.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    refusal: Callable[[Tensor], str | None]


@dataclass(frozen=True)
class Paired:
    """The kernels of a backend with a vendor's first order. Mapped tensors (vmap) go to the backend alone, and so
    does a backward pass of ``grad_rows``."""

    vendor: Vendor
    kernels: Kernels

    def forward(self, x: Tensors, aux: Tensors, **options: Any) -> tuple[Tensors, Tensors]:
        if _mapped(x):
            return self.kernels.forward(x, aux, **options)
        o, lse = self.vendor.forward(*map(_rows_dense, x), options["causal"], options["scale"])
        return (o,), (lse.contiguous(),)

    def backward(self, x: Tensors, aux: Tensors, y: Tensors, saved: Tensors, y_bar: Tensors, needs: Flags,
                 **options: Any) -> Tensors:
        # a vendor computes the gradients of all rows, a backend of grad_rows alone
        if options["grad_rows"] is not None or _mapped((*x, *y_bar)):
            return self.kernels.backward(x, aux, y, saved, y_bar, needs, **options)
        grads = self.vendor.backward(*map(_rows_dense, (*y_bar, *x, *y)), *saved, options["causal"], options["scale"])
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))

    def __getattr__(self, name: str) -> Any:
        """The dual kernels."""
        return getattr(self.kernels, name)


def _cpu_flash_forward(q, k, v, causal, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_flash_backward(do, q, k, v, o, lse, causal, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, causal, scale=scale)


def _cpu_flash_refusal(q):
    return None if q.device.type == "cpu" else f"it runs on a CPU, not on {q.device.type}"


def _flash_forward(q, k, v, causal, scale):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]


def _flash_backward(do, q, k, v, o, lse, causal, scale):
    # not varlen, so no boundaries; without dropout no random state is read
    state = q.new_empty(2, dtype=torch.int64)
    return aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, state, state, scale=scale)


def _cudnn_forward(q, k, v, causal, scale):
    o, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return o, lse.view(q.shape[:3])


def _cudnn_backward(do, q, k, v, o, lse, causal, scale):
    state = q.new_empty((), dtype=torch.int64)
    return aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse.unsqueeze(-1), state, state, None, None, None, q.shape[2], k.shape[2], 0.0, causal,
        scale=scale)


def _cuda_refusal(q):
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on a CUDA device, not on {q.device.type}"
    if q.dtype not in HALF:
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"it takes head dimensions that are multiples of 8 up to 256, not {q.shape[-1]}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def _cudnn_refusal(q):
    reason = _cuda_refusal(q)
    if reason is None and q.shape[-1] > 128:
        return f"it takes head dimensions up to 128, not {q.shape[-1]}"
    if reason is None and torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic, which torch.use_deterministic_algorithms(True) asks for"
    return reason


VENDORS: Mapping[str, Vendor] = {
    "cpu_flash": Vendor(_cpu_flash_forward, _cpu_flash_backward, _cpu_flash_refusal),
    "flash": Vendor(_flash_forward, _flash_backward, _cuda_refusal),
    "cudnn": Vendor(_cudnn_forward, _cudnn_backward, _cudnn_refusal)}

#: What ``first_order`` takes.
CHOICES = ("own", *VENDORS)

#: For each type of device the vendor of the automatic choice, where it serves and the backend is not faster itself
#: (docs/attention.md has the measurements).
DEFAULTS: Mapping[str, str] = {"cpu": "cpu_flash", "cuda": "flash"}


def automatic_choice(kernels: Kernels, device: torch.device) -> str:
    """Who runs the first order on a device where nobody was asked for, ``"own"`` or a vendor that may not serve."""
    return "own" if getattr(kernels, "FASTEST_FIRST_ORDER", False) else DEFAULTS.get(device.type, "own")


def choose(name: str | None, kernels: Kernels, x: tuple[Tensor, Tensor, Tensor], aux: Tensors,
           options: Mapping[str, Any], *, automatic: bool) -> Kernels:
    """The kernels with the first order that ``name`` asks for; ``automatic``: ``None`` may choose a vendor.

    Raises:
        BackendError: if the vendor asked for cannot serve the call, with the reason.
    """
    vendor = name or (automatic_choice(kernels, x[0].device) if automatic else "own")
    if vendor == "own":
        return kernels
    reason = _refusal(vendor, x, aux, options)
    if reason is None:
        return Paired(VENDORS[vendor], kernels)
    if name is None:
        return kernels
    raise BackendError(f"attention: first_order: {name!r} cannot serve this call: {reason}; pass first_order='own', or "
                       f"None for the automatic choice")


def _refusal(vendor: str, x: tuple[Tensor, Tensor, Tensor], aux: Tensors, options: Mapping[str, Any]) -> str | None:
    q, k, _ = x
    given = [name for name in ("window", "softcap") if options[name] is not None]
    given += ["dropout"] * (options["dropout"] > 0)
    if given or any(t is not None for t in aux):
        return f"it has no {' and '.join(given) or 'padding, packing, mask or bias'}"
    if options["causal"] and q.shape[2] != k.shape[2]:
        return "it aligns causal queries top-left, which differs where there are more keys or fewer"
    if options["scale"] <= 0:
        return f"it takes a positive scale, not {options['scale']}"
    if any(t.numel() == 0 for t in x):
        return "a tensor is empty"
    return VENDORS[vendor].refusal(q)


def _mapped(tensors: Tensors) -> bool:
    return any(t is not None and is_wrapped(t) for t in tensors)


def _rows_dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
