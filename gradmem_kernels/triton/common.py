"""What Triton ops share: where they run, precision, layouts, and their registration as torch operators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["INTERPRETED", "accumulator", "architecture", "define", "dot_precision", "like", "on_device", "one_by_one",
           "one_layout", "refusal", "rows_dense", "strides"]

#: Whether kernels run in Triton's interpreter; fixed when they are decorated.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_LIBRARY = torch.library.Library("gradmem", "FRAGMENT")


def refusal(like: Tensor | None) -> str | None:
    """Why Triton cannot serve tensors like this one; ``None`` if it can."""
    device = like.device.type if like is not None else "cpu" if INTERPRETED else "cuda"
    if device == "cpu":
        if not INTERPRETED:
            return "Triton kernels run on a CPU only in its interpreter, with TRITON_INTERPRET=1 set beforehand"
        if like is not None and like.dtype == torch.bfloat16:
            return "Triton's interpreter is wrong for bfloat16"
        return None
    if device != "cuda" or torch.version.hip is not None:
        return f"Triton kernels run on CUDA devices, not on {device if device != 'cuda' else 'ROCm'}"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set: kernels run on the CPU only"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if like is not None and torch.cuda.get_device_capability(like.device) < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability(like.device)}, at least (8, 0) is needed"
    if like is not None and like.dtype == torch.float64:
        return "float64 is served by the reference backend on a GPU"
    return None


def architecture(like: Tensor) -> str:
    """The key of the tables of configurations: ``"interpreter"``, ``"sm_80"`` or ``"sm_90"``."""
    if INTERPRETED:
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(like.device)[0] == 9 else "sm_80"


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """TF32 for float32 where PyTorch's own matrix products may use it (``torch.set_float32_matmul_precision``).

    Otherwise three TF32 products, which are about as exact as float32 and run on tensor cores: Triton's plain float32
    products spill thousands of bytes in these kernels.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on torch's current device and its current stream: make that the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def rows_dense(t: Tensor | None) -> Tensor | None:
    """``t``, copied if the elements of a row are not neighbours in memory."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def one_layout(t: Tensor, tangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both, rows dense, with the same strides; copied where they are not."""
    if tangent is None:
        return rows_dense(t), None
    if t.stride() == tangent.stride() and rows_dense(t) is t:
        return t, tangent
    return t.contiguous(), tangent.contiguous()


def like(t: Tensor, count: int = 1) -> Tensor:
    """An unwritten tensor of the layout of ``t``, rows dense; for ``count`` of them ``[count, *shape]``."""
    out = torch.empty_like(t)
    if rows_dense(out) is not out:
        out = torch.empty_like(t, memory_format=torch.contiguous_format)
    return out if count == 1 else t.new_empty_strided((count, *t.shape), (t.numel(), *out.stride()))


def strides(t: Tensor | None) -> tuple[int, int, int]:
    """Of batch, head and row."""
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(1), t.stride(2))


def define(name: str, schema: str, launch: Callable[..., Any], meta: Callable[..., Any],
           shared: Collection[str] = (), broadcast: Collection[str] = (), ranks: Sequence[int] = (),
           mapped: Callable[..., tuple[Any, Any]] | None = None) -> Callable[..., Any]:
    """Registers ``gradmem::name`` and returns it.

    ``meta`` gives its outputs unwritten. Under vmap the mapped dimension is folded into the batch, the first dimension
    of every tensor but those named in ``shared``; those in ``broadcast`` may have a batch of 1. ``ranks`` are those of
    the outputs: a dimension more is that of stacked results, fewer are of one that is absent. An op for which this does
    not do brings a rule of its own, ``mapped(op, size, in_dims, arguments by name) -> outputs, out_dims``.
    """
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, launch, "CPU")
    _LIBRARY.impl(name, launch, "CUDA")
    torch.library.register_fake(f"gradmem::{name}", meta, lib=_LIBRARY)
    op = getattr(torch.ops.gradmem, name).default
    names = [argument.name for argument in op._schema.arguments]

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if mapped is not None:
            return mapped(op, info.batch_size, in_dims, dict(zip(names, args, strict=True)))
        # dropout follows the place in the batch, which is the same for every mapped call
        if dict(zip(names, args, strict=True)).get("dropout") or any(
                isinstance(d, int) for n, d in zip(names, in_dims, strict=True) if n in shared):
            return one_by_one(op, info.batch_size, in_dims, args)
        batch = next(t.movedim(d, 0).shape[1] for t, d in zip(args, in_dims, strict=True) if isinstance(d, int))
        folded = [_fold(t, d, info.batch_size, batch, n in broadcast)
                  if isinstance(t, Tensor) and n not in shared else t
                  for n, t, d in zip(names, args, in_dims, strict=True)]
        out = op(*folded)
        places = [t.dim() - rank if t.dim() >= rank else None for t, rank in zip(out, ranks, strict=True)]
        return (tuple(t if d is None else t.unflatten(d, (info.batch_size, batch))
                      for t, d in zip(out, places, strict=True)), tuple(places))

    torch.library.register_vmap(f"gradmem::{name}", vmap, lib=_LIBRARY)
    return op


def _fold(t: Tensor, dim: int | None, size: int, batch: int, broadcast: bool) -> Tensor:
    if dim is None:
        if broadcast and t.shape[0] == 1:
            return t
        t = t.unsqueeze(0).expand(size, *t.shape)
    else:
        t = t.movedim(dim, 0)
    if t.shape[1] != batch:
        t = t.expand(size, batch, *t.shape[2:])
    return t.flatten(0, 1)


def one_by_one(op: Callable[..., tuple[Tensor, ...]], size: int, in_dims: Sequence[int | None],
               args: Sequence[Any]) -> tuple[Any, Any]:
    """A rule for vmap: a call for each of the ``size`` mapped entries."""
    outs = [op(*(t.select(d, i) if isinstance(d, int) else t for t, d in zip(args, in_dims, strict=True)))
            for i in range(size)]
    return tuple(map(torch.stack, zip(*outs, strict=True))), (0,) * len(outs[0])
