"""What a CUDA graph does, without a GPU: operations are recorded once, and run again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Entry(NamedTuple):
    func: Any
    args: Any
    kwargs: Any
    written: list[Tensor]
    results: list[Tensor]


class Recorder(TorchDispatchMode):
    """Writes down every operation, and what the tensors it changes held before."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[Entry] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = zip(func._schema.arguments, args, strict=False)
        named = ((argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs)
        written = [t for argument, value in (*given, *named)
                   if argument.alias_info is not None and argument.alias_info.is_write for t in tensors(value)]
        self.before += [(t, t.clone()) for t in written]
        out = func(*args, **kwargs)
        storages = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        results = [t for t in tensors(out) if t.untyped_storage()._cdata not in storages]
        if results or written:  # a view stays a view of what is recorded
            self.tape.append(Entry(func, args, kwargs, written, results))
        return out


class TapeCapture:
    """A :class:`gradmem.graphs.Capture` that records operations.

    As with a CUDA graph, recording changes nothing, a replay runs no Python of the function, reads and writes the
    tensors of the recording and nothing else, and is not seen by version counters.
    """

    def __init__(self) -> None:
        self.warmups = self.records = self.replays = 0

    def warm_up(self, run: Callable[[], Any]) -> Any:
        self.warmups += 1
        return run()

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.records += 1
        with Recorder() as recorder:
            outputs = run()
        with torch.no_grad():
            for tensor, before in reversed(recorder.before):
                tensor.detach().copy_(before)

        def replay() -> Any:
            self.replays += 1
            with torch.no_grad():
                for entry in recorder.tape:
                    with _unsafe_preserve_version_counter(tuple(entry.written)):
                        out = entry.func(*entry.args, **entry.kwargs)
                    known = {t.untyped_storage()._cdata for t in tensors((entry.args, entry.kwargs))}
                    new = [t for t in tensors(out) if t.untyped_storage()._cdata not in known]
                    for result, value in zip(entry.results, new, strict=True):
                        result.detach().copy_(value)
            return outputs

        return replay
