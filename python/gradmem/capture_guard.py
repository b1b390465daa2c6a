"""Watches code that goes into a CUDA graph: refuses what a graph cannot hold, and keeps alive what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradmem.errors import GraphError

__all__ = ["CaptureGuard"]

_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index",
             "aten::_unsafe_index_put")
_COPIES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::copy")
_MASKS = (torch.bool, torch.uint8)


class CaptureGuard(TorchDispatchMode):
    """A dispatch mode for the code that is captured, and for what runs ahead of it to warm up.

    A graph is a list of kernels with the addresses that they read and write. So, in what it watches,

    - no value may go to the host: it would be looked at once, not in every replay;
    - no shape may depend on values;
    - no random numbers are drawn, no data moves between devices;
    - what is read and was not made here must live as long as the graph: ``kept`` holds it.

    Args:
        name: of what is captured, for the errors.

    Raises:
        GraphError: from the operation that cannot be captured.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.kept: dict[int, torch.UntypedStorage] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        reason = _refusal(func, args, kwargs, tensors)
        if reason is not None:
            raise GraphError(f"{self.name}: {func} cannot be captured into a CUDA graph: {reason}, or go without "
                             f"graphs")
        for storage in map(Tensor.untyped_storage, tensors):
            if storage._cdata not in self._made:
                self.kept[storage._cdata] = storage
        out = func(*args, **kwargs)
        self._made.update({t.untyped_storage()._cdata for t in _tensors(out)} - self.kept.keys())
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _refusal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]) -> str | None:
    """Why a graph cannot hold this operation, and the remedy."""
    name = func._schema.name
    if name in _INDEXING:
        if any(index.dtype in _MASKS for index in _tensors(args[1])):
            return "the number of elements that a mask selects is a shape that depends on values; use torch.where"
    elif torch.Tag.data_dependent_output in func.tags:
        return ("it reads a value on the host (.item(), float(), a condition on a tensor); keep the value in a tensor, "
                "and unset GRADMEM_DEBUG, whose checks read values")
    elif torch.Tag.dynamic_output_shape in func.tags:
        return "the shape of its result depends on values; use a result of fixed shape, as of torch.where"
    if torch.Tag.nondeterministic_seeded in func.tags and _argument(func, args, kwargs, "dropout_p") != 0.0:
        return "it draws random numbers; make them ahead and pass them as tensors"
    if name in _COPIES:
        devices = {tensor.device for tensor in tensors}
        target = kwargs.get("device")
        if len(devices | ({torch.device(target)} if target is not None else set())) > 1:
            return "it copies between devices; move the data ahead"
    return None


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The value of an argument of an operation; ``None`` where it has none of that name."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[position] if position < len(args) else kwargs.get(name, argument.default_value)
    return None
