"""Peak memory of a piece of work on CPU, where PyTorch has no allocator statistics."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveMemory", "peak_live_bytes"]


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every tensor storage that is made inside the ``with`` block, until it is freed.

    The mode sees each op that reaches the dispatcher, those of backward passes and of custom autograd functions
    included (on CPU the autograd engine works in the calling thread). A storage counts once, however many views share
    it; what lived before the block does not count. Not seen: scratch space inside a single kernel.

    Attributes:
        live: bytes now alive, ``peak``: the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.finalize[Any, UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in given and storage._cdata not in self._storages:
                self._count(storage)
        return out

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        super().__exit__(kind, value, trace)
        for finalizer in self._storages.values():
            finalizer.detach()
        self._storages.clear()

    def _count(self, storage: UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._storages[key] = weakref.finalize(storage, self._freed, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live -= size


def peak_live_bytes(work: Callable[[], Any]) -> int:
    """The most bytes of new tensors that were alive at once while ``work()`` ran, its result included."""
    with LiveMemory() as memory:
        work()
    return memory.peak


def _storages(tree: Any) -> list[UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree)
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
